"""A language model is checked right after it was fetched, before any other work depends on it.

What a large model computes is tried on a small copy, with one layer of each kind, random weights, a narrow
feed-forward network and few tokens. So the check takes seconds and at most 3 GB for a model of any size.
"""

import copy
import json
import logging
import math
import os
import resource
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers import logging as transformers_logging

from cell2text.errors import InputError
from cell2text.generation.decode import write_texts
from cell2text.model import fast
from cell2text.model.cell2text import Cell2Text, count_positions
from cell2text.model.language_model import NEEDS_TOKENIZER, OTHER_MODEL, load_tokenizer, read_config, reported
from cell2text.model.projectors import Mlp
from cell2text.model.prompt import SOURCE, Prompt

log = logging.getLogger("cell2text.models")

LOCAL = {"local_files_only": True, "trust_remote_code": False, "use_safetensors": True}
FETCH_AGAIN = "Fetch or save the model again"
SAMPLE = "This is a CD4-positive, alpha-beta T cell (80 kDa). The sample is blood, without known disease."
# Limits of a chat template: Jinja's sandbox forbids long ranges, but not a loop in a loop or a huge string.
SECONDS, MEMORY = 60, 4 * 2**30
WEIGHTS = 500_000_000  # a model with more, 2 GB in float32, is tried on a small copy with these sizes
TOKENS, VOCABULARY, EXPERTS, FEED_FORWARD = 24, 256, 16, 64
TOLERANCE = 1e-3  # relative difference of two losses in float32


def check_language_model(directory: str | Path) -> None:
    """Check that a language model can be trained and can write, and log on which path it trains.

    Parameters
    ----------
    directory
        A Hugging Face directory.

    Raises
    ------
    InputError
        If it cannot, for any reason that the model's files show.
    """
    directory = Path(directory)
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        with reported("it cannot be used"):
            _check(directory)
    finally:
        transformers_logging.set_verbosity(verbosity)


def _check(directory: Path) -> None:
    _check_files(directory)
    config = read_config(directory)
    _try_with_limits(lambda: Prompt.of(load_tokenizer(directory)))
    tokenizer = load_tokenizer(directory)
    prompt = Prompt.of(tokenizer)
    shapes = _load_shapes(directory)
    _check_tokenizer(tokenizer, prompt, shapes.get_input_embeddings().weight.shape[0])
    positions, needed = count_positions(config), len(prompt.before) + len(prompt.after)
    if positions is not None and positions <= needed:
        raise InputError(SOURCE, f"it has {positions} positions, and the prompt alone needs {needed}", OTHER_MODEL)
    _check_computation(directory, shapes, tokenizer)


def _check_files(directory: Path) -> None:
    """Raise an error if there is an adapter, or an index names files that are not in the folder."""
    if any(directory.glob("adapter_*")):
        problem = "an adapter (adapter_config.json) is beside the weights, which do not contain it"
        raise InputError(SOURCE, problem, "Merge the adapter into the model and save that, or remove the adapter")
    for index in directory.glob("*.index.json"):
        with reported(f"{index.name} cannot be read"):
            files = set(json.loads(index.read_text())["weight_map"].values())
        for name in sorted(map(str, files)):
            if Path(name).name != name:
                raise InputError(SOURCE, f"{index.name} names {name}, which is outside the model's folder", FETCH_AGAIN)
            if not (directory / name).is_file():
                raise InputError(SOURCE, f"{index.name} names {name}, which does not exist", FETCH_AGAIN)


def _try_with_limits(function: Callable[[], Any]) -> None:
    """Raise an error if a function takes too long or too much memory; it runs in a copy of this process."""
    process = get_context("fork").Process(target=_run_with_limits, args=(function,), daemon=True)
    process.start()
    process.join(SECONDS)
    if process.exitcode != 0:
        process.kill()
        process.join()
        problem = f"its chat template takes more than {SECONDS} s or {MEMORY >> 30} GB of memory"
        raise InputError(SOURCE, problem, "Correct the template, or remove it from the model's folder")


def _run_with_limits(function: Callable[[], Any]) -> None:
    used = Path("/proc/self/statm")
    if used.is_file():
        allowed = int(used.read_text().split()[0]) * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (allowed, allowed))
    try:
        with suppress(InputError):  # raised again outside, where it is reported
            function()
    except MemoryError:
        os._exit(1)


def _load_shapes(directory: Path) -> PreTrainedModel:
    """Return the model without values, after comparing names and shapes of all weights with the config."""
    with reported("its weights cannot be loaded"):
        model, found = AutoModelForCausalLM.from_pretrained(
            directory,
            **LOCAL,
            device_map="meta",
            ignore_mismatched_sizes=True,  # reported below
            output_loading_info=True,
        )
    for kind in ("missing", "mismatched"):
        if names := sorted(str(name[0] if isinstance(name, tuple) else name) for name in found[f"{kind}_keys"]):
            has = "lack" if kind == "missing" else "have other shapes than config.json for"
            raise InputError(SOURCE, f"its weights {has} {', '.join(names[:3])} ({len(names)} in all)", FETCH_AGAIN)
    return model


def _check_tokenizer(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, embeddings: int) -> None:
    ids = tokenizer(SAMPLE, add_special_tokens=False)["input_ids"]
    if (found := tokenizer.decode(ids).strip()) != SAMPLE:
        problem = f"its tokenizer turns {SAMPLE[:24]!r}... into {found[:24]!r}..."
        raise InputError(SOURCE, problem, NEEDS_TOKENIZER)
    # A special token that no text contains, such as one for padding, may be without embedding.
    special = {token for token, content in tokenizer.added_tokens_decoder.items() if content.special}
    used = {*prompt.before.tolist(), *prompt.after.tolist(), tokenizer.eos_token_id}
    used |= set(tokenizer.get_vocab().values()) - special
    if max(used) >= embeddings:
        problem = f"its tokenizer has tokens up to number {max(used)}, but there are only {embeddings} embeddings"
        raise InputError(SOURCE, problem, "Resize the embeddings, or take the tokenizer that belongs to the model")


def _check_computation(directory: Path, shapes: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Compare what a model computes in different ways; if it is large, what a small copy computes."""
    kind = type(shapes).__name__
    if _count_weights(shapes) <= WEIGHTS:
        with reported(f"{kind} cannot be used"):
            _compare(AutoModelForCausalLM.from_pretrained(directory, **LOCAL, dtype=torch.float32), tokenizer)
        return
    try:
        _compare(_small_copy(shapes.config), tokenizer)
    except InputError:
        raise
    except Exception as error:  # noqa: BLE001 - some families need certain sizes or layers
        log.info("%s cannot be tried on a small copy (%s)", kind, str(error).partition("\n")[0])


@torch.no_grad()
def _compare(language_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Compare what a model computes in different ways.

    Raises
    ------
    InputError
        If a token changes what is computed before it, embeddings as input give something else than tokens, or writing
        token by token gives other probabilities than reading the text. That the fast path differs is only logged.
    """
    kind, random = type(language_model).__name__, torch.Generator().manual_seed(0)
    embed = language_model.eval().get_input_embeddings()
    ids = torch.randint(0, min(VOCABULARY, embed.weight.shape[0]), (2, TOKENS), generator=random)
    of_tokens = language_model(input_ids=ids, use_cache=False).logits
    if not bool(of_tokens.isfinite().all()):
        raise InputError(SOURCE, f"{kind} computes values that are not finite", FETCH_AGAIN)
    until = language_model(input_ids=ids[:, : TOKENS // 2], use_cache=False).logits
    tolerance = {"rtol": TOLERANCE, "atol": TOLERANCE * float(of_tokens.std())}
    if not torch.allclose(of_tokens[:, : TOKENS // 2], until, **tolerance):
        problem = f"{kind} is not causal here: what it computes for a token depends on later ones"
        raise InputError(SOURCE, problem, OTHER_MODEL)
    of_embeddings = language_model(inputs_embeds=embed(ids), use_cache=False).logits
    if not torch.allclose(of_tokens, of_embeddings, **tolerance):
        problem = f"{kind} computes something else from embeddings than from tokens, so it cannot read soft tokens"
        raise InputError(SOURCE, problem, OTHER_MODEL)
    projector = Mlp(5, embed.weight.shape[1], hidden=8)
    projector.start_at(embed(ids[0]))
    model = Cell2Text(language_model, tokenizer, projector, {}).eval()
    model.prompt, model.tokenizer = Prompt(ids[0, :4], ids[0, 4:7]), SimpleNamespace(eos_token_id=-1)  # never ends
    vectors, lengths = torch.randn(2, 3, 5, generator=random), torch.tensor([3, 2])
    soft, present = model.projector(vectors, lengths)
    written = write_texts(model, vectors, lengths, 3)
    text = torch.tensor([one.ids for one in written])
    at_once = float(model.text_loss(soft, present, text, torch.ones_like(text, dtype=torch.bool))[0])
    one_by_one = -sum(sum(one.log_probabilities) for one in written)
    if not math.isclose(at_once, one_by_one, rel_tol=TOLERANCE, abs_tol=TOLERANCE):
        losses = f"{one_by_one:.4f} and {at_once:.4f} nats"
        raise InputError(
            SOURCE, f"{kind} gives other probabilities token by token than at once ({losses})", OTHER_MODEL
        )
    mask = torch.arange(TOKENS) < torch.tensor([[TOKENS], [TOKENS // 2]])
    if fast.check(model, soft, present, ids, mask):
        log.info("%s can be trained on the fast path", kind)


def _count_weights(model: PreTrainedModel) -> int:
    return sum(value.numel() for value in model.parameters())


def _small_copy(config: PreTrainedConfig) -> PreTrainedModel:
    """Return a small model of the same kind, float32, with weights so large that its output depends on every token."""
    config = copy.deepcopy(config)
    for part in (config, *(getattr(config, name) for name in config.sub_configs)):
        if isinstance(part, PreTrainedConfig):
            _shrink(part)
    options = {"dtype": torch.float32, "trust_remote_code": False}
    with torch.device("meta"):
        weights = _count_weights(AutoModelForCausalLM.from_config(config, **options))
    if weights > WEIGHTS:
        raise ValueError(f"it would have {weights / 1e9:.1f} billion weights")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, **options).eval()
    embeddings = model.get_input_embeddings().weight  # small, because they may be the head too
    with torch.no_grad():
        for value in model.parameters():
            if value.dim() > 1:
                value.normal_(0, (0.3 if value is embeddings else 2) / math.sqrt(value.shape[-1]))
    return model


def _shrink(config: PreTrainedConfig) -> None:
    layers = getattr(config, "num_hidden_layers", None)
    if layers:
        kinds = list(getattr(config, "layer_types", None) or [None] * layers)
        kept = sorted(map(kinds.index, set(kinds))) if len(set(kinds)) > 1 else [0, layers - 1]
        for name, value in list(vars(config).items()):
            if isinstance(value, list) and len(value) == layers:
                setattr(config, name, [value[index] for index in kept])
        config.num_hidden_layers = len(kept)
    limits = dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), EXPERTS)
    limits |= dict.fromkeys(("intermediate_size", "moe_intermediate_size", "ffn_dim", "n_inner"), FEED_FORWARD)
    for name, limit in (limits | {"vocab_size": VOCABULARY}).items():
        if isinstance(value := getattr(config, name, None), int):
            setattr(config, name, min(value, limit))
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(config, name, 0)
