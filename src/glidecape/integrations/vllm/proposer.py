"""`GlideProposer`: what vLLM constructs for `speculative_config={"method": "custom_class", …}`."""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray

from ...core.transfer import to_device
from ...drafting.drafter import ModelDrafter
from ...drafting.expansions.chain import Chain
from ...drafting.methods import make_drafter
from ...drafting.options import MethodOptions
from ...drafting.stop import StopPolicy
from ...drafts.checkpoint import read_card, read_unbound, resolve
from ...drafts.glide.adapter import GlideDraft
from ...drafts.glide.network import GlideModel
from ...errors import InputError, UnsupportedError
from .lent import Facts, layers_of, lend
from .paged import gather
from .rows import DraftRow, RowDrafter
from .runner import check_reading, introduce, refuse_layer, refuse_settings, refuse_untried
from .sampling import mend_sampling

METHOD = "glide"


class GlideProposer:
    """GliDe inside vLLM: it drafts chains that vLLM verifies, reading the target's keys and values in vLLM's paged cache.

    Args:
        vllm_config: vLLM's. `additional_config["glide"]` holds our options: `draft`, a folder or Hub name; `method`, "glide"
            (the default) or "glide+svip"; and fields of `MethodOptions`. No draft is longer than `num_speculative_tokens`.

    Raises:
        InputError: no draft, or an unknown option.
        UnsupportedError: a version or setting of vLLM, or a method, that cannot be used; see `runner`.

    Lossless: vLLM verifies; each drafted token is a point mass.
    """

    def __init__(self, vllm_config: Any) -> None:
        refuse_untried()
        refuse_settings(vllm_config)
        given = vllm_config.additional_config
        options = dict(given.get("glide") or {}) if isinstance(given, dict) else {}
        if "draft" not in options:
            raise InputError('GliDe inside vLLM needs a draft: additional_config={"glide": {"draft": "path/to/draft"}}')
        self.folder, self.method = resolve(options.pop("draft")), options.pop("method", METHOD)
        self.vllm_config, self.most = vllm_config, vllm_config.speculative_config.num_speculative_tokens
        self.options = MethodOptions().changed(**{"length": self.most, **options})
        if (kind := read_card(self.folder).kind) != GlideModel.kind:
            raise UnsupportedError(
                f"vLLM hands a proposer no hidden states: it takes a GliDe draft, and this is {kind}"
            )
        self.drafter: RowDrafter
        self.runner: Any = None
        self.layers: dict[int, tuple[str, Any]] = {}  # name and `Attention` of those that the draft reads
        self.groups: dict[int, int] = {}  # which of vLLM's cache groups each of them is in
        introduce(GlideProposer)
        mend_sampling()

    def load_model(self, target_model: Any) -> None:
        """Called by vLLM when its model is loaded; `target_model` is that.

        Raises:
            CheckpointError, MismatchError: the draft is damaged, or of another target.
            UnsupportedError: the model, the draft or the method cannot be used here, with the reason.
        """
        network = read_unbound(self.folder, Facts(self.vllm_config))
        assert isinstance(network, GlideModel)
        if network.config.glimpse:
            raise UnsupportedError("vLLM hands a proposer no hidden states, and this draft has a glimpse of them")
        layers = layers_of(self.vllm_config)
        self.layers = {number: layers[number] for number in network.config.layers_read}
        for number, (_, layer) in self.layers.items():
            refuse_layer(number, layer)
        network.borrow(lend(target_model, self.vllm_config, network.config.reads[-1][-1]))
        model = self.vllm_config.model_config
        network.to(device=self.vllm_config.device_config.device, dtype=model.dtype).serve()
        self.drafter = RowDrafter(network, *_stop(self.method, network, self.options, self.most))

    def attach(self, runner: Any) -> None:
        """Called by vLLM's model runner when it has made its cache.

        Raises:
            UnsupportedError: the cache is not laid out as we read it.
        """
        self.runner, self.drafter.kept = runner, {}
        groups = [group.layer_names for group in runner.kv_cache_config.kv_cache_groups]
        for number, (name, layer) in self.layers.items():
            check_reading(layer)
            self.groups[number] = next(place for place, names in enumerate(groups) if name in names)

    def propose(
        self,
        sampled_token_ids: list[list[int]],
        num_tokens_no_spec: NDArray[Any],
        token_ids_cpu: NDArray[Any],
        slot_mappings: Any = None,
    ) -> list[list[int]]:
        """A draft for every row, empty where there is nothing to draft. Called by vLLM after each step.

        Args:
            sampled_token_ids: what each row has just emitted; nothing while its prompt is read.
            num_tokens_no_spec: `(rows,)`, known tokens of each row; the last one's keys are not in the cache yet.
            token_ids_cpu: `(rows, context)`, the tokens.
            slot_mappings: not used.
        """
        batch, requests = self.runner.input_batch, self.runner.requests
        self.drafter.forget(requests)
        drafts: list[list[int]] = [[] for _ in sampled_token_ids]
        rows, places = [], []
        for place, sampled in enumerate(sampled_token_ids):
            length, request = int(num_tokens_no_spec[place]), batch.req_ids[place]
            room = self._room(requests[request], length) if sampled else 0
            if room > 0:
                rows.append(DraftRow(request, token_ids_cpu[place, :length].copy(), room))
                places.append(place)
        if rows:
            found = self.drafter.draft(rows, self._cross(places, max(len(row.tokens) for row in rows) - 1))
            for place, draft in zip(places, found, strict=True):
                drafts[place] = draft
        return drafts

    def _room(self, request: Any, length: int) -> int:
        """Tokens of a draft that a request may still emit before the one that ends it."""
        if request.prompt_embeds is not None:
            return 0  # its tokens are not known
        room, limit = self.vllm_config.model_config.max_model_len - length, request.sampling_params.max_tokens
        return room if limit is None else min(room, limit - len(request.output_token_ids) - 1)

    def _cross(self, places: list[int], length: int) -> dict[int, Any]:
        """Keys and values of the target layers that are read, of the rows in these places."""
        batch, cross = self.runner.input_batch, {}
        for number, (_, layer) in self.layers.items():
            tables = batch.block_table[self.groups[number]].get_device_tensor(batch.num_reqs)
            tables = tables.index_select(0, to_device(places, tables.device))
            cross[number] = gather(layer.attn_backend.get_name(), layer.kv_cache, tables, length)
        return cross


def _stop(method: str, network: GlideModel, options: MethodOptions, most: int) -> tuple[StopPolicy, int]:
    """The stop policy of a method, and the most tokens that it drafts.

    Raises:
        InputError: unknown method or option.
        UnsupportedError: a method that proposes trees, or whose length follows what was accepted.
    """
    drafter = make_drafter(method, GlideDraft(network), options)
    if not isinstance(drafter, ModelDrafter) or type(drafter.expansion) is not Chain or hasattr(drafter.stop, "start"):
        raise UnsupportedError(f"vLLM verifies chains, and '{method}' is more than that: use glide or glide+svip")
    return drafter.stop, min(drafter.cap, most)
