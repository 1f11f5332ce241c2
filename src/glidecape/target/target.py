"""`Target`: any transformers causal LM whose attention follows a mask, run on our cache without forked modelling code.

Our attention and mask functions (`attention.py`) are registered under our own name and set on this model alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..compat import attend_without_plans, cache_argument, register_attention
from ..core.cache import KVCache
from ..core.masks import tree_mask
from ..core.transfer import to_device
from ..core.tree import TokenTree
from ..core.verify import verdict_numbers
from ..errors import GlideCapeError, InputError, UnsupportedError, first_line
from ..tables import millions
from .attention import ATTENTION, LAYOUT, Layout, attention, layer_mask
from .loading import commit_of, load_model, pinned
from .packages import Program, compiled, source_digest
from .packed import pack as pack_layers
from .packed import unpack as unpack_layers
from .placement import is_offloaded, layers_of, runs_on, stored_weights
from .program import CompiledTarget, CompiledVerdict, TargetProgram, example, verdict_program
from .quantize import dense, refuse_quantized
from .quantize import quantize as quantize_layers


@dataclass(frozen=True)
class TargetOutput:
    """What a target's forward gives: `logits (batch, nodes, vocab)`, in the model's dtype."""

    logits: Tensor


UNLIMITED = 2**31 - 1  # the context of a target that declares none
ROUNDING = 0.1  # of the largest logit: how far a program's logits may be from the model's, in bfloat16


class Target:
    """A causal LM that decodes token trees on a `KVCache`.

    Args:
        model: a transformers causal LM; its attention implementation is replaced by ours.
        tokenizer: needed for text in and out, not for token ids.
        probe: check at once that trees decode right on this model (a few small forwards).
        pack: pack the weights for decoding where that is faster (see `packed`), for products in the model's dtype or in
            the one given. Training unpacks them again.

    Raises:
        UnsupportedError: the architecture cannot decode trees on our cache, with the reason.

    >>> from glidecape import Target
    >>> target = Target.from_pretrained("path/to/model")
    >>> target.context, len(target.encode("def load(")) > 0
    (192, True)
    """

    chunk = 512  # tokens of a prompt that are read in one forward

    def __init__(self, model: Any, tokenizer: Any = None, probe: bool = True, pack: bool | torch.dtype = False) -> None:
        self.model, self.tokenizer, self.config = model.eval(), tokenizer, model.config
        self.text_config = model.config.get_text_config()
        refuse_by_config(self.text_config)
        refuse_quantized(model)
        register_attention(ATTENTION, attention, layer_mask)
        model.set_attn_implementation(ATTENTION)
        attend_without_plans(self.device)
        self.num_parameters = sum(p.numel() for p in model.parameters())
        self.cache_argument = cache_argument(model)
        self.name: str | None = None  # folder or Hub name
        self.commit: str | None = None  # of a Hub model
        self._digest: str | None = None
        self.quantized: str | None = None  # by whom, where it was done here
        self.compiled: CompiledTarget | None = None
        self.verdict: Callable[[TokenTree, Tensor], Tensor] = verdict_numbers
        self.offloaded = is_offloaded(model)
        self.packed = bool(pack) and not self.offloaded and self._pack(None if pack is True else pack)
        self.shapes, devices = layers_of(model, self.text_config, self.device)
        # Of each layer where they differ; None: all follow the model, which may be moved.
        self.layer_devices = devices if set(devices) != {self.device} else None
        if probe:
            from .probe import probe_target

            try:
                probe_target(self)
            except GlideCapeError:
                raise
            except Exception as error:
                reason = (
                    f"{self.text_config.model_type} cannot run a token tree on our cache: its own code stops with "
                    f"{type(error).__name__} ({first_line(error)})"
                )
                raise UnsupportedError(reason) from error

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        dtype: str | torch.dtype = "auto",
        device: str = "cpu",
        revision: str | None = None,
        trust_remote_code: bool = False,
        probe: bool = True,
        pack: bool | torch.dtype = True,
        quantize: str | None = None,
        device_map: str | dict[str, Any] | None = None,
    ) -> Target:
        """Load a model folder, or a model of the Hub by name, "owner/model" or "owner/model@revision"; `quantize`: "int8"
        weights (see `quantize`).

        Args:
            device_map: as in transformers, such as "auto", in the place of `device`: split over devices by accelerate.

        Raises:
            CheckpointError: see `loading.load_model`.
            InputError: an unknown quantizer, or torchao is not installed.
            UnsupportedError: see the class.
        """
        options = {"revision": revision, "trust_remote_code": trust_remote_code}
        model, tokenizer = load_model(name, dtype, options, device_map)
        if quantize is not None:
            quantize_layers(model, quantize)
        target = cls(model.to(device) if device_map is None else model, tokenizer, probe, pack)
        (target.name, revision), target.quantized = pinned(name, revision), quantize
        target.commit = commit_of(target.name, revision)
        return target

    @property
    def pinned_name(self) -> str | None:
        """Its name, with the commit that was loaded where it is a Hub name: "owner/model@commit"."""
        return f"{self.name}@{self.commit}" if self.name and self.commit else self.name

    @property
    def summary(self) -> str:
        """Its name, size, dtype and device."""
        dtype = f"{self.quantized or str(self.dtype).removeprefix('torch.')} on {self.device}"
        return f"{self.name or self.text_config.model_type}: {millions(self.num_parameters)} parameters, {dtype}"

    def __repr__(self) -> str:
        return f"Target({self.summary}, {'eager' if self.compiled is None else 'compiled'})"

    def _pack(self, products: Any) -> bool:
        digest = self.weights_digest  # packed weights are in no state_dict
        packed = pack_layers(self.model, products)
        self._digest = digest if packed else None
        return packed

    def unpack(self) -> None:
        """Undo packing, so that gradients can pass."""
        unpack_layers(self.model)
        self.packed, self._digest = False, None
        self.compiled = None  # a program holds the weights of its time

    def program(self) -> Program:
        """Its forward, to be compiled (`packages.Program`)."""
        facts = {"kind": "target", "config": self.config.to_json_string(), "code": source_digest(self.model)}
        name = f"the model of {millions(self.num_parameters)} parameters"
        make = lambda: (TargetProgram(self), *example(self))  # noqa: E731
        return Program(name, facts, (self.model,), make, device=self.device)

    def compile(self, mode: str = "on", say: Callable[[str], None] = print) -> bool:
        """Decode by a compiled program from now on; False where it stays eager, which is said.

        The logits of a node then have the same bits in every tree and every batch, so each method's output is plain decoding's
        even where two tokens are as probable as each other. A GPU captures CUDA graphs instead (see `graphs`), whose sums
        have no one order.

        Args:
            mode: "on"; "kept": only if the program was compiled before.
            say: is told what takes time, and why something is not compiled.
        """
        if self.compiled is not None:
            return True
        if self.placed:
            if mode == "on":
                say("the model is not compiled: its layers are on several devices, or its weights are offloaded")
            return False
        run = compiled(self.program(), mode, say)
        self.compiled = None if run is None else self._tried(CompiledTarget(run), say)
        verdict = None if self.compiled is None else compiled(verdict_program(self.device), mode, say)
        self.verdict = verdict_numbers if verdict is None else CompiledVerdict(verdict)
        return self.compiled is not None

    @torch.no_grad()
    def _tried(self, program: CompiledTarget, say: Callable[[str], None]) -> CompiledTarget | None:
        """The program, if it runs for one row and many, one node and many, and gives the model's logits; else None, and
        why. Some models' code keeps an exported program from sizes of 1."""
        for rows, nodes in ((1, 1), (1, 3), (2, 1), (2, 3)):
            tokens = torch.arange(rows * nodes, device=self.device).view(rows, nodes) % self.vocab_size
            positions = torch.arange(nodes, device=self.device).expand(rows, -1)
            expected = self.forward(tokens, positions, self.new_cache(rows, 8)).logits.float()
            try:
                found = program(tokens, positions, self.new_cache(rows, 8), None, 0, None).float()
                if not (found - expected).abs().max() <= ROUNDING * expected.abs().max():  # nor if it is no number
                    say(f"the model is not compiled: its program's logits for {rows} x {nodes} nodes are wrong")
                    return None
            except RuntimeError as error:
                if nodes == 1 and not program.pairs:
                    program.pairs = True
                    return self._tried(program, say)
                say(f"the model is not compiled: its program fails for {rows} x {nodes} nodes ({first_line(error)})")
                return None
        return program

    def keep_digest(self) -> None:
        """Digest the weights now, and keep to it: they are going to be split or moved."""
        self._digest = self.weights_digest

    @property
    def weights_digest(self) -> str:
        """`digest_of` the model's weights."""
        if self._digest is None and self.offloaded:
            self._digest = digest_of(stored_weights(self.model))  # of a disk, perhaps: once is enough
        return self._digest if self._digest is not None else digest_of(self.model.state_dict())

    @property
    def device(self) -> torch.device:
        """Of its input embedding: of token ids, logits, and all that a draft reads and writes."""
        return runs_on(self.model.get_input_embeddings())

    @property
    def placed(self) -> bool:
        """Is it split over several devices, or are its weights offloaded?"""
        return self.offloaded or self.layer_devices is not None

    def refuse_placed(self, what: str) -> None:
        """Raises UnsupportedError if it is `placed`; `what` needs a model on one device."""
        if self.placed:
            raise UnsupportedError(
                f"{what} needs a model on one device, and this one is split over several, or its weights are offloaded: load "
                "it without a device_map"
            )

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @cached_property
    def vocab_size(self) -> int:
        return self.text_config.vocab_size  # asked several times a round, and a configuration answers slowly

    @property
    def context(self) -> int:
        """Longest sequence in tokens, prompt and output together."""
        return getattr(self.text_config, "max_position_embeddings", None) or UNLIMITED

    @property
    def layer_kinds(self) -> list[str]:
        """ "full_attention", "sliding_attention" or "chunked_attention" for each layer that keeps keys and values."""
        kinds = getattr(self.text_config, "layer_types", None) or ["full_attention"] * len(self.shapes)
        return list(kinds)[: len(self.shapes)]

    def query_heads(self, layer: int) -> int:
        """How many query heads a draft should have to read the keys and values of a layer: a multiple of theirs."""
        kv_heads, heads = self.shapes[layer][0], self.text_config.num_attention_heads or 0
        # The configuration of an encoder and decoder counts the encoder's.
        return heads if heads and heads % kv_heads == 0 else kv_heads

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        found = getattr(self.model.generation_config, "eos_token_id", None)
        found = self.config.eos_token_id if found is None else found
        if found is None:
            return ()
        return tuple(found) if isinstance(found, (list, tuple)) else (found,)

    @property
    def hidden_size(self) -> int:
        """Width of the last hidden states: what the output head takes, after the final norm."""
        return self.model.get_output_embeddings().in_features

    @property
    def embed_width(self) -> int:
        """Width of the input embeddings."""
        return self.model.get_input_embeddings().weight.shape[1]

    def new_cache(self, batch: int, capacity: int, limit_bytes: int | None = None, hidden: bool = False) -> KVCache:
        """An empty cache; with `hidden` every forward writes its last hidden states there, too."""
        width = self.hidden_size if hidden else 0
        return KVCache(
            self.shapes,
            batch,
            capacity,
            self.dtype,
            self.device,
            self.layer_devices,
            limit_bytes=limit_bytes,
            hidden=width,
        )

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt, with the tokenizer's own special tokens.

        Raises:
            InputError: the prompt is empty, or no text that UTF-8 can write.
        """
        try:
            text.encode()
        except UnicodeEncodeError:
            raise InputError("the prompt is not UTF-8 text: give it in that encoding") from None
        ids = self.tokenizer(text)["input_ids"] if text else []
        if not ids:
            raise InputError("the prompt is empty: give at least one token to continue")
        return list(ids)

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        cache: KVCache,
        ancestors: Tensor | None = None,
        logits_to_keep: int = 0,
        scratch_positions: Tensor | None = None,
    ) -> TargetOutput:
        """Run the model on scratch slots; their keys and values are written, nothing is committed.

        Args:
            tokens, positions: `(batch, nodes)`; positions are absolute.
            ancestors: `(batch, nodes, scratch)`, which scratch slots a node may read: itself and its ancestors. The nodes'
                own slots are the last. None: a chain.
            logits_to_keep: logits of the last so many nodes only; 0: of all.
            scratch_positions: `(batch, scratch)` of all scratch slots, for a draft that runs its tree in several forwards;
                None: the nodes are all there is.
        """
        # Prompts run eagerly in bfloat16, where oneDNN's products are twice as fast with so many rows, and on GPUs, which have
        # enough to do then and would need a graph for each length.
        prompt = bool(logits_to_keep) and (self.dtype == torch.bfloat16 or self.device.type != "cpu")
        if self.compiled is not None and not prompt:
            logits = self.compiled(tokens, positions, cache, ancestors, logits_to_keep, scratch_positions)
            return TargetOutput(logits)
        causal = ancestors is None and cache.longest + cache.scratch == 0
        mask = None if causal else tree_mask(cache, ancestors, tokens.shape[1])
        scratch = positions if scratch_positions is None else scratch_positions
        token = LAYOUT.set(Layout(cache.lengths, positions, scratch, mask))
        watch = None if cache.hidden is None else self.body.register_forward_hook(_keep_hidden(cache))
        try:
            out = self.model(
                input_ids=tokens,
                # Nodes past the context are only ever clipped off; a learned position table must not be overrun by them.
                position_ids=positions.clamp(max=self.context - 1),
                **{self.cache_argument: cache},
                use_cache=True,
                # Asked for few logits, layers that share keys leave the other tokens out: no hidden states of them.
                logits_to_keep=logits_to_keep if cache.hidden is None else 0,
            )
        finally:
            LAYOUT.reset(token)
            if watch is not None:
                watch.remove()
        logits = out.logits
        return TargetOutput(logits if logits.device == tokens.device else logits.to(tokens.device, non_blocking=True))

    @property
    def body(self) -> nn.Module:
        """The model without its output head."""
        body = self.model.base_model
        return self.model.get_decoder() if body is self.model else body

    def prefill(self, prompts: list[list[int]], cache: KVCache) -> None:
        """Commit each row's prompt but for its last token, which becomes the root. Rows may differ in length."""
        while read_chunk(self, prompts, cache):
            pass


def _keep_hidden(cache: KVCache) -> Callable[..., None]:
    def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
        last = output[0] if isinstance(output, tuple) else output.last_hidden_state
        if cache.hidden is None or last.shape[-1] != cache.hidden.shape[-1]:
            raise UnsupportedError(f"this target's last hidden states have width {last.shape[-1]}, not its head's")
        cache.write_hidden(last.detach())

    return hook


def digest_of(state: Mapping[str, Tensor]) -> str:
    """sha256 of about 1 MB of fixed weight slices: the same in float32 and in bfloat16 for weights stored in either, another in
    float16, which rounds small weights differently."""
    digest, share = hashlib.sha256(), max(64, 2**18 // max(1, len(state)))
    for name in sorted(state):
        piece = dense(state[name]).flatten()[:share]
        if piece.is_floating_point():
            digest.update(piece.detach().to(torch.bfloat16).view(torch.int16).cpu().numpy().tobytes())
    return digest.hexdigest()


def read_chunk(target: Target, rows: list[list[int]], cache: KVCache, chunk: int | None = None) -> bool:
    """Commit the next tokens of each row, `chunk` at most (None: `target.chunk`) and never the last one; False if all were
    read."""
    rest = [tokens[n:-1] for n, tokens in zip(cache.host_lengths, rows, strict=True)]
    width = min(chunk or target.chunk, max(map(len, rest)), cache.capacity - cache.longest)
    if width == 0:
        return False
    pieces = [tokens[:width] for tokens in rest]
    tokens = to_device([piece + [0] * (width - len(piece)) for piece in pieces], target.device)
    # Padding comes after a row's own tokens, so causal order hides it from them; it is not committed.
    positions = cache.lengths[:, None] + torch.arange(width, device=target.device)
    target.forward(tokens, positions, cache, logits_to_keep=1)
    cache.commit([len(piece) for piece in pieces])
    return True


def refuse_by_config(config: Any) -> None:
    """Architectures that no mask can make into a tree decoder."""
    name = getattr(config, "model_type", "unknown")
    layers = set(getattr(config, "layer_types", None) or [])
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedError(f"{name} is an encoder-decoder model; GlideCape decodes causal language models")
    unknown = layers - {"full_attention", "sliding_attention", "chunked_attention"}
    if unknown or getattr(config, "layers_block_type", None) or name in {"mamba", "mamba2", "rwkv", "falcon_mamba"}:
        reason = ", ".join(sorted(unknown)) or "recurrent layers"
        raise UnsupportedError(f"{name} has {reason}: a recurrent or compressed state cannot hold a token tree")
    if getattr(config, "kv_lora_rank", None):
        raise UnsupportedError(f"{name} keeps a compressed (MLA) cache, which GlideCape does not read yet")
    if getattr(config, "alibi", False) or name in {"bloom", "mpt"}:
        raise UnsupportedError(f"{name} takes positions from cache slots (ALiBi): tree nodes would get wrong ones")
