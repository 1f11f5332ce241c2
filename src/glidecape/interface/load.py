"""`load`: a target, its draft and a method in one line."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from ..costs import ALONE_ROWS, are_kept, prices_file, prices_of
from ..drafting.auto.drafter import AutoDrafter
from ..drafting.drafter import Drafter
from ..drafting.methods import BY_DRAFT, DRAFTLESS, make_drafter, method_for, parse_method
from ..drafting.options import MethodOptions
from ..drafts.card import WEIGHTS
from ..drafts.causal_lm import StandaloneDraft
from ..drafts.checkpoint import NetworkDraft, load_draft, read_card
from ..drafts.sharing import target_named_by, target_of_lm
from ..errors import InputError, first_line
from ..progress import note
from ..target.loading import pinned
from ..target.placement import check_map
from ..target.target import Target
from ..usual import auto_drafter, take_prices
from .language_model import LanguageModel

WORTH = 20_000  # tokens to decode from which on compiling, some minutes, is made up for
COMPILE = ("auto", "on", "off")
DTYPES = ("auto", "float32", "bfloat16", "float16")


def load(
    model: str | Path,
    draft: str | Path | None = None,
    method: str = "usual",
    options: MethodOptions | None = None,
    *,
    compile: str = "auto",
    dtype: str | torch.dtype = "auto",
    device: str = "cpu",
    threads: int = 0,
    quantize: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    device_map: str | dict[str, Any] | None = None,
) -> LanguageModel:
    """Load a model, and what makes it faster.

    Args:
        model: folder or Hub name of the target; or of a draft alone, whose card names its target. "owner/name@revision" pins
            a branch, tag or commit, here and of a draft.
        draft: folder or Hub name of a draft made by `glidecape train`, or of a small causal LM with the model's vocabulary.
        method: such as "glide+cape+svip" (docs/methods.md); "usual": what suits the draft, or prompt lookup without one;
            "auto": the same, and measured costs decide how much is drafted (docs/auto.md). "usual" is "auto", too, unless
            `options` are given, `compile` is "off", or costs are not known yet and the model is large or the machine busy.
        options: of the method, such as `MethodOptions(length=4)`.
        compile: "on", "off" as `--compile` of the command line; "auto": use programs that were compiled before. With "off"
            nothing is measured either, unless `method` asks for it.
        dtype: "float32", "bfloat16", "float16" or the same of torch; "auto": as stored.
        device: such as "cpu" or "cuda".
        threads: on a CPU; 0: PyTorch's choice.
        quantize: "int8": weights in 8 bits, by torchao.
        revision: branch, tag or commit of a Hub model; it goes before one in the model's name.
        trust_remote_code: run model code that comes with the weights.
        device_map: as in transformers, such as "auto": the model is split over devices by accelerate (docs/scaling.md).

    Raises:
        InputError: an unknown method, dtype or device, or a draft of another kind than the method's.
        CheckpointError, MismatchError, UnsupportedError: see `Target.from_pretrained` and `load_draft`.

    >>> import glidecape
    >>> lm = glidecape.load("path/to/model", draft="path/to/draft", options=glidecape.MethodOptions(length=4))
    >>> lm.method, lm.draft.kind
    ('glide', 'glide')
    >>> glidecape.load("path/to/draft").target.vocab_size == lm.target.vocab_size  # its card names the model
    True
    """
    model, draft = _checked_pair(model, draft, method, compile)  # before anything is loaded
    target = load_target(
        model,
        dtype,
        device,
        threads,
        quantize=quantize,
        revision=revision,
        trust_remote_code=trust_remote_code,
        device_map=device_map,
    )
    lm = with_draft(target, draft, method, options)
    return prepared(lm, compile, tokens=0, may_choose=method == "usual" and options is None)


def _checked_pair(
    model: str | Path, draft: str | Path | None, method: str, compile: str
) -> tuple[str | Path, str | Path | None]:
    """`pair_of`, once method and `compile` are known to exist, and the method to have the draft that it needs.

    Raises:
        InputError: one of them does not.
        CheckpointError: see `pair_of`.
    """
    base = None if method in BY_DRAFT else parse_method(method)[0]
    if compile not in COMPILE:
        raise InputError(f"compile takes {', '.join(COMPILE)}, not '{compile}'")
    model, draft = pair_of(model, draft)
    if draft is None and base is not None and base not in DRAFTLESS:
        make_drafter(method)  # says what is missing
    return model, draft


def pair_of(model: str | Path, draft: str | Path | None = None) -> tuple[str | Path, str | Path | None]:
    """The model and the draft that are meant: a draft that stands alone in the place of the model brings its model.

    Raises:
        CheckpointError: its card names no model, or one that is not there.
    """
    if draft is None and (named := _target_of_draft(model)) is not None:
        return named, model
    return model, draft


def with_draft(
    target: Target, draft: str | Path | None, method: str = "usual", options: MethodOptions | None = None
) -> LanguageModel:
    """A loaded target with a draft and a method, see `load`."""
    loaded = fitting_draft(draft, method, target)
    chosen = method_for(method, None if loaded is None else loaded.kind)
    return LanguageModel(target, make_drafter(chosen, loaded, options), chosen, loaded)


def fitting_draft(name: str | Path | None, method: str, target: Target) -> NetworkDraft | StandaloneDraft | None:
    """The draft of a method; None where it needs none. "usual" and "auto" take any.

    Raises:
        InputError: an unknown method.
        CheckpointError, MismatchError: see `load_draft`.
    """
    base = None if method in BY_DRAFT else parse_method(method)[0]
    if name is None or base in DRAFTLESS:
        return None
    return load_draft(name, target)


def load_target(
    name: str | Path,
    dtype: str | torch.dtype = "auto",
    device: str = "cpu",
    threads: int = 0,
    *,
    pack: bool = True,
    quantize: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    device_map: str | dict[str, Any] | None = None,
) -> Target:
    """A target by what a user types; `pack=False`: to be trained on.

    Raises:
        InputError: an unknown dtype, a device that is not there, or see `check_map`.
        CheckpointError, UnsupportedError: see `Target.from_pretrained`.
    """
    check_map(device_map, device, quantize)
    if isinstance(dtype, str) and dtype not in DTYPES:
        raise InputError(f"unknown dtype '{dtype}': choose float32, bfloat16, float16 or auto")
    use_device(device, threads)
    kind = getattr(torch, dtype) if isinstance(dtype, str) and dtype != "auto" else dtype
    return Target.from_pretrained(
        name, kind, device, revision, trust_remote_code, pack=pack, quantize=quantize, device_map=device_map
    )


def use_device(device: str, threads: int = 0) -> None:
    """Set the threads; refuse a device that is not there.

    Raises:
        InputError: it is not.
    """
    if threads:
        torch.set_num_threads(threads)
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device '{device}' cannot be used here: {first_line(error)}") from None


def prepared(
    lm: LanguageModel,
    compile: str,
    tokens: float,
    may_choose: bool = False,
    say: Callable[[str], None] = note,
) -> LanguageModel:
    """The model with all that it needs to decode so many tokens: programs are compiled where that was asked for or is worth
    it, and `auto` knows what a round costs.

    Args:
        may_choose: nobody asked for a method. Then measured costs decide what is drafted (`auto`), where they are known or
            quickly measured (`usual.take_prices`).
    """
    if may_choose and compile != "off":
        method, drafter = auto_drafter(lm.draft)
        compile_models(lm.target, [drafter], compile, tokens, say)
        if take_prices(lm.target, drafter, tokens >= WORTH, say):
            return LanguageModel(lm.target, drafter, method, lm.draft)
    compile_models(lm.target, [lm.drafter], compile, tokens, say)
    set_prices(lm.target, [lm.drafter])
    return lm


def compile_models(
    target: Target,
    drafters: Iterable[Drafter],
    compile: str,
    tokens: float = math.inf,
    say: Callable[[str], None] = note,
) -> None:
    """Compile what decodes, if that was asked for or is worth it for so many tokens."""
    if compile == "off":
        return
    mode = "on" if compile == "on" or tokens >= WORTH else "kept"
    target.compile(mode, say)
    for drafter in drafters:
        drafter.compile(mode, say)


def set_prices(target: Target, drafters: Iterable[Drafter], alone: bool = False) -> None:
    """Let `auto` know what a round costs, once it is decided what is compiled.

    Args:
        alone: each row is decoded alone. Then the costs of one row will do, unless those of batches are kept already.
    """
    for drafter in drafters:
        if isinstance(drafter, AutoDrafter):
            rows = ALONE_ROWS if alone and not are_kept(prices_file(target, drafter)) else None
            drafter.set_prices(prices_of(target, drafter, note, rows=rows), timed=True)


def _target_of_draft(name: str | Path) -> str | None:
    """The target that a draft's card names, where `name` is a draft of ours; None where it is something else.

    An LM that was trained as a draft says so in its card, too; one whose card names no target is a model like any other.
    """
    folder = Path(name).expanduser()
    if not folder.exists() and (kept := _draft_on_hub(str(name))) is not None:
        folder = kept
    if (folder / WEIGHTS).is_file():
        return target_named_by(folder, read_card(folder).target)
    named = target_of_lm(folder)
    return None if named is None else target_named_by(folder, named)


def _draft_on_hub(name: str) -> Path | None:
    """The snapshot of a Hub repository that holds a draft of ours; None where it does not, or cannot be asked."""
    from huggingface_hub import constants, file_exists, snapshot_download, try_to_load_from_cache

    name, revision = pinned(name)
    if name.count("/") != 1 or name.startswith((".", "~", "/")) or Path(name).parent.is_dir():
        return None
    try:
        if isinstance(try_to_load_from_cache(name, "config.json", revision=revision), str):
            return None  # a model that was loaded before
        if isinstance(kept := try_to_load_from_cache(name, WEIGHTS, revision=revision), str):
            return Path(kept).parent
        if constants.HF_HUB_OFFLINE or not file_exists(name, WEIGHTS, revision=revision):
            return None
        return Path(snapshot_download(name, revision=revision))
    except Exception:  # of the HTTP library, or the Hub's own; loading the model will say what is wrong
        return None
