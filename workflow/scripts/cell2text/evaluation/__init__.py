"""Every method's descriptions scored on the same cells, with intervals."""

FINE_TUNED = "cell2text"  # the method name of the fine-tuned model; baselines are named by their files
