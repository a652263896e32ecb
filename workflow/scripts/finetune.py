"""Fine-tune the language model to describe cells."""

import torch

from cell2text.embedding.vectors import Embeddings
from cell2text.finetuning.finetune import finetune
from cell2text.job import run_job
from cell2text.settings import FinetuneSettings, ProjectorSettings


def main(snakemake):
    """Run the rule."""
    finetune(
        snakemake.input.language_model,
        snakemake.input.descriptions,
        snakemake.input.terms,
        Embeddings(snakemake.input.embeddings, **snakemake.params.on_the_fly),
        snakemake.output.model,
        projector=ProjectorSettings(**snakemake.params.projector),
        settings=FinetuneSettings(**snakemake.params.finetune),
        seed=snakemake.params.seed,
        library=snakemake.params.library,
        processes=snakemake.resources.gpu if torch.cuda.is_available() else 1,
        # not among the params: a change of it must not train the model again
        max_new_tokens=snakemake.config["generate"]["max_new_tokens"],
    )


if __name__ == "__main__":
    run_job(main, snakemake)  # noqa: F821
