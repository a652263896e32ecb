"""Fine-tune the language model to describe cells."""

from cell2text.embedding.vectors import Embeddings
from cell2text.finetuning.finetune import finetune
from cell2text.job import find_process_number, run_job
from cell2text.processes import count_processes, run_on_nodes
from cell2text.settings import FinetuneSettings, ProjectorSettings


def main(snakemake):
    """Run the rule."""
    settings = FinetuneSettings(**snakemake.params.finetune)
    # before anything is read
    processes = count_processes(settings.gpus, snakemake.resources.gpu // settings.nodes)
    if settings.nodes > 1 and find_process_number() is None:
        run_on_nodes(settings.nodes, processes, snakemake.resources.cpus_per_gpu)
        return
    stored = Embeddings(snakemake.input.embeddings, **snakemake.params.on_the_fly)
    with stored.with_store() as embeddings:
        finetune(
            snakemake.input.language_model,
            snakemake.input.descriptions,
            snakemake.input.terms,
            embeddings,
            snakemake.output.model,
            projector=ProjectorSettings(**snakemake.params.projector),
            settings=settings,
            seed=snakemake.params.seed,
            library=snakemake.params.library,
            processes=processes,
            # not among the params: a change of it must not train the model again
            max_new_tokens=snakemake.config["generate"]["max_new_tokens"],
        )


if __name__ == "__main__":
    run_job(main, snakemake)  # noqa: F821
