"""The packed SigLIP2 NaFlex vision model.

Shapes: N images, T total patches, P patch_dim, D hidden size, L layers.
"""

from __future__ import annotations

import copy
import operator
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Siglip2VisionConfig
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPooling, ModelOutput

from siglip2_packed import fused, invariance, plain, quantized
from siglip2_packed.attention import attention_name, head_dim, requested_attention
from siglip2_packed.checkpoints import CheckpointedModel, NoPoolingHead, strip_prefix
from siglip2_packed.configuration import check_config, layer_index, patch_dim
from siglip2_packed.ddp import watch_first_step
from siglip2_packed.embeddings import Siglip2PackedEmbeddings
from siglip2_packed.encoder import Siglip2PackedEncoder, Siglip2PackedEncoderLayer, join_projections
from siglip2_packed.graphs import BUDGETS, Graphs
from siglip2_packed.kinds import uses_head
from siglip2_packed.layout import Layout, check_numbers, integers, make_layout
from siglip2_packed.ops.attention import VarlenAttention, for_pack
from siglip2_packed.ops.positions import Places
from siglip2_packed.ops.runtime.tracing import capturing, traced
from siglip2_packed.ops.segments import Segments
from siglip2_packed.overflow import watch
from siglip2_packed.packing import GridLike, check_patches
from siglip2_packed.pooling import PoolingAttention, Siglip2PackedPoolingHead


@dataclass
class TokenOutput(BaseModelOutput):
    """Output of a model without a pooling head."""

    @property
    def pooler_output(self):
        raise NoPoolingHead(
            "checkpoint has no pooling head (or the model was built without: vision_use_head=False or select_layer), "
            "so there are no pooled features; use last_hidden_state"
        )


if TYPE_CHECKING:
    from typing_extensions import Self

    class PackedOutput(BaseModelOutputWithPooling):
        """What a model returns, as type checkers see it: all that is there is a tensor."""

        last_hidden_state: Tensor  # type: ignore[assignment]
        pooler_output: Tensor  # type: ignore[assignment]
        hidden_states: tuple[Tensor, ...]  # type: ignore[assignment]


class Siglip2PackedVisionModel(CheckpointedModel):
    """SigLIP2 NaFlex vision tower on packed patches.

    Args:
        config: `Siglip2VisionConfig`, of which the model keeps a copy. Beside transformers' fields it may carry
            `select_layer`: an index into hidden_states (0 after the embeddings, k after layer k, negative from the
            end). Such a model ends there: layers above, post_layernorm and the head are neither built nor loaded, and
            `last_hidden_state` is that hidden state.
            `batch_invariant`: an image's features are the same to the bit whatever shares its pack, in bfloat16 or
            float16 on CUDA; may be set at any time. A forward that cannot keep to it raises ValueError, see
            `invariance`. Features with gradients and without, or beside `output_hidden_states`, are still two ways.

    Training on token features alone leaves the pooling head without gradients, for which DistributedDataParallel
    waits: it averages none in the first step, which is said once, and raises in the second. Load with
    `vision_use_head=False` then.

    It computes what transformers' `Siglip2VisionModel` (4.57 and 5.x) does of each image without its padding: SigLIP 2
    (arXiv 2502.14786), section 2.4.2; the pooling head is that of Scaling Vision Transformers (arXiv 2106.04560).

    Raises:
        ValueError: a configuration that says what this model does not compute.

    Examples:
        >>> import torch
        >>> from siglip2_packed import Siglip2PackedVisionModel
        >>> model = Siglip2PackedVisionModel.from_pretrained("google/siglip2-so400m-patch16-naflex").eval()
        >>> with torch.inference_mode():
        ...     out = model(torch.zeros(26, 768), [[1, 2, 3], [1, 4, 5]])
        >>> out.last_hidden_state.shape == (26, model.config.hidden_size)
        True
        >>> out.pooler_output.shape == (2, model.config.hidden_size)
        True
    """

    config: Siglip2VisionConfig
    config_class = Siglip2VisionConfig
    base_model_prefix = "vision_model"
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Siglip2PackedEmbeddings", "Siglip2PackedEncoderLayer", "Siglip2PackedPoolingHead"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    graphs: Graphs | None = None
    """Those that packs run in, if any."""
    _settled: int | None = None
    """Which model's projections were joined: this one's, or that of which this is a copy."""

    def __init__(self, config: Siglip2VisionConfig):
        check_config(config)
        config = copy.deepcopy(config)  # the caller's stays as it is
        super().__init__(config)
        select_layer = getattr(config, "select_layer", None)
        if select_layer is not None:
            select_layer = config.select_layer = operator.index(select_layer)
        num_layers = layer_index(select_layer, config.num_hidden_layers)
        self.embeddings = Siglip2PackedEmbeddings(config)
        self.encoder = Siglip2PackedEncoder(config, num_layers)
        if select_layer is None:
            self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
            if uses_head(config):
                self.head = Siglip2PackedPoolingHead(config)
        self.register_load_state_dict_pre_hook(strip_prefix)
        self.post_init()

    @property
    def dtype(self) -> torch.dtype:
        """What features are computed in, and config.json says: not what a quantised weight is stored in."""
        return self.embeddings.compute_dtype

    if TYPE_CHECKING:  # nn.Module's are of any type

        def __call__(self, pixel_values: Tensor, grid_thw: GridLike, *args: Any, **kwargs: Any) -> PackedOutput: ...
        def to(self, *args: Any, **kwargs: Any) -> Self: ...  # type: ignore[override]
        def cuda(self, *args: Any, **kwargs: Any) -> Self: ...  # type: ignore[override]
        def eval(self) -> Self: ...
        def train(self, mode: bool = True) -> Self: ...

    @torch.compiler.disable(recursive=False)  # its parts are compiled, not the host work on metadata
    def forward(
        self,
        pixel_values: Tensor,
        grid_thw: Any,
        output_hidden_states: bool | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        temporal: str | None = None,
        position_ids: Tensor | None = None,
        return_dict: bool | None = None,
        output_attentions: bool | None = None,
    ) -> ModelOutput | tuple:
        """Encodes a pack.

        Args:
            pixel_values: `[T, P]` floating patches, raster order, each (py, px, c); cast to the weights' dtype.
            grid_thw: `[N, 3]` integers (t, h, w) in patches, covering T. On the host it costs no device sync, on a
                device one, before the first layer.
            output_hidden_states: also return the L+1 hidden states: `[0]` after the embeddings, `[k]` after layer k,
                all before post_layernorm.
            cu_seqlens: `[S+1]` integers, the attention segments; `temporal` makes them when left out.
            max_seqlen: upper bound of the segments' lengths.
            temporal: `"frames"`: every frame attends to itself; `"joint"`: all t frames of an image to each other.
                Not together with `cu_seqlens`: a `PackedPatches` has chosen already.
            position_ids: `[T]` integers, for rows that are not all patches of each image in raster order (a sparse
                video): row r has the position of patch `position_ids[r]` of those that `grid_thw` covers. `cu_seqlens`
                then tells the segments. For models without a pooling head.

        Returns:
            `last_hidden_state [T, D]` (after post_layernorm), `pooler_output [N, D]` and `hidden_states`, in the
            weights' dtype (under autocast, as transformers'). Without a pooling head, `pooler_output` raises
            `NoPoolingHead`. Of half precisions take bfloat16: float16 ends at 65,504, and features beyond it are not
            finite, which is logged once.

        Raises:
            ValueError: patches and grid that do not fit each other or the model, integer pixels, an attention backend
                that cannot run here.
        """
        if output_attentions or (output_attentions is None and self.config.output_attentions):
            raise ValueError("output_attentions: varlen attention never forms the weights it would return")
        if output_hidden_states is None:
            output_hidden_states = bool(self.config.output_hidden_states)
        position_ids = None if position_ids is None else integers(position_ids, "position_ids")
        layout = self._layout(pixel_values, grid_thw, cu_seqlens, max_seqlen, temporal, position_ids)
        output = None
        if self.graphs is not None and position_ids is None and not output_hidden_states:
            output = self._replayed(self.graphs, pixel_values, layout)
        if output is None:
            output = self._launched(pixel_values, layout, position_ids, output_hidden_states)
        watch(self, output)
        watch_first_step(self, output)
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return output if return_dict else output.to_tuple()

    def cuda_graphs_enable(self, budgets: Sequence[int] = BUDGETS) -> None:
        """Packs run in CUDA graphs from now on, forward and backward, where that is possible: see `CUDAGraphs`.

        Args:
            budgets: buckets' numbers of patches. A pack beyond the largest runs without a graph.
        """
        self.graphs = Graphs(budgets)

    def cuda_graphs_disable(self) -> None:
        self.graphs = None

    @torch.compiler.disable
    def features_of(self, graphs: Graphs, pixel_values: Tensor, grid_thw: Any, cu_seqlens, max_seqlen, temporal):
        """As `forward`, by graphs that somebody else holds."""
        layout = self._layout(pixel_values, grid_thw, cu_seqlens, max_seqlen, temporal)
        output = self._replayed(graphs, pixel_values, layout)
        if output is None:
            return self(pixel_values, grid_thw=grid_thw, cu_seqlens=cu_seqlens, temporal=temporal, return_dict=True)
        watch(self, output)
        watch_first_step(self, output)
        return output

    @torch.compiler.disable
    def _replayed(self, graphs: Graphs, pixel_values: Tensor, layout: Layout) -> ModelOutput | None:
        """From a CUDA graph; None where there can be none."""
        features = graphs.features(self, pixel_values, layout)
        if features is None:
            return None
        hidden_states, pooled = features
        return TokenOutput(hidden_states) if pooled is None else BaseModelOutputWithPooling(hidden_states, pooled)

    @torch.compiler.disable(recursive=False)  # as the forward
    def _launched(
        self, pixel_values: Tensor, layout: Layout, position_ids: Tensor | None, output_hidden_states: bool
    ) -> ModelOutput:
        """Kernel by kernel."""
        device = pixel_values.device
        if device.type == "cpu":
            quantized.keep_layout(self)
        elif not (traced() or capturing(device)):
            self._settle()
        return self._features(
            pixel_values,
            Places(layout.grids, position_ids, self.embeddings.resize_mode(layout.grids)),
            self._attention(Segments(layout.lengths, device)),
            Segments(layout.image_lengths, device) if hasattr(self, "head") else None,
            output_hidden_states,
        )

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict | None = None, **kwargs: Any):
        """Recomputes every encoder layer in backward; non-reentrant (layers see to it): frozen inputs and DDP work."""
        with warnings.catch_warnings():  # transformers 5.24 renames it; both names are ours
            warnings.simplefilter("ignore", FutureWarning)
            super().gradient_checkpointing_enable(gradient_checkpointing_kwargs=gradient_checkpointing_kwargs, **kwargs)

    def activation_checkpointing_enable(  # type: ignore[override]
        self, activation_checkpointing_kwargs: dict | None = None, **kwargs: Any
    ):
        """`gradient_checkpointing_enable` by its newer name, whatever the version of transformers."""
        self.gradient_checkpointing_enable(activation_checkpointing_kwargs, **kwargs)

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings.patch_embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embeddings.patch_embedding = value  # type: ignore[assignment]

    def _settle(self) -> None:
        """Has projections joined where the model has come to a device, once."""
        if self._settled != id(self):
            join_projections(self.encoder)
            self._settled = id(self)  # now, as other threads do not wait from here on

    def _apply(self, *args: Any, **kwargs: Any) -> Self:
        self._settled = None
        return super()._apply(*args, **kwargs)  # type: ignore[no-any-return]

    @torch.compiler.disable(recursive=False)  # as the forward
    def _features(
        self,
        pixel_values: Tensor,
        places: Places,
        attention: VarlenAttention,
        images: Segments | None,
        output_hidden_states: bool = False,
    ) -> ModelOutput:
        """Patches `[T, P]` -> features, wherever their metadata came from; `images` are what the head pools."""
        if attention.invariant:
            self._check_invariant(pixel_values)
        frozen = bool(self.embeddings.patch_embedding._forward_hooks) and not plain.learns(self)
        hidden_states = self.embeddings(pixel_values, places, frozen, attention.invariant)
        hidden_states, all_hidden_states = self._encode(hidden_states, attention, output_hidden_states)
        if images is None:
            return TokenOutput(hidden_states, hidden_states=all_hidden_states)
        pooled = self.head(hidden_states, images, attention.invariant)
        return BaseModelOutputWithPooling(hidden_states, pooled, hidden_states=all_hidden_states)

    def _check_invariant(self, pixel_values: Tensor) -> None:
        """Raises ValueError where parts are others than those that see to it themselves, or more than their class."""
        parts = [*self.children(), *getattr(self.encoder, "layers", ())]
        kept = {Siglip2PackedEmbeddings, Siglip2PackedEncoder, Siglip2PackedEncoderLayer, nn.LayerNorm}
        other = next((type(part) for part in parts if type(part) not in {*kept, Siglip2PackedPoolingHead}), None)
        if other is not None or plain.watched(pixel_values) or not plain.unhooked(*parts):
            raise invariance.refused(self, pixel_values.to(self.embeddings.compute_dtype), other)

    def _encode(
        self, hidden_states: Tensor, attention: VarlenAttention, output_hidden_states: bool
    ) -> tuple[Tensor, tuple[Tensor, ...] | None]:
        """`[T, D]` -> `[T, D]` after all layers and post_layernorm, and the hidden states if asked for."""
        norm = getattr(self, "post_layernorm", None)
        if norm is not None and not output_hidden_states:
            plainly = self._plain_weights(hidden_states, norm)
            if plainly is not None:
                layers, last = plainly
                return fused.infer(layers, hidden_states, attention, last), None
        hidden_states, all_hidden_states = self.encoder(hidden_states, attention, output_hidden_states)
        return hidden_states if norm is None else norm(hidden_states), all_hidden_states

    def _plain_weights(
        self, hidden_states: Tensor, norm: nn.LayerNorm
    ) -> tuple[list[fused.LayerWeights], fused.Norm] | None:
        """Those of all layers and of `norm`, if calling the encoder, and then the norm, would do no more."""
        if plain.watched(hidden_states) or type(self.encoder) is not Siglip2PackedEncoder or plain.learns(norm):
            return None
        of_norm = plain.weights((norm, nn.LayerNorm), dtype=hidden_states.dtype)
        if of_norm is None or not plain.unhooked(self.encoder) or self.encoder.learns(hidden_states):
            return None
        layers = self.encoder.plain_weights(hidden_states)
        if layers is None:
            return None
        weight, bias = of_norm
        return layers, fused.Norm(weight, bias, norm.eps)

    @torch.compiler.disable
    def _layout(self, pixel_values: Tensor, grid_thw, cu_seqlens, max_seqlen, temporal, position_ids=None) -> Layout:
        check_patches(pixel_values, patch_dim(self.config))
        if pixel_values.is_meta and not self.embeddings.patch_embedding.weight.is_meta:
            check_numbers(pixel_values, "pixel_values")
        if temporal is not None and cu_seqlens is not None:
            raise ValueError("give temporal or cu_seqlens (PackedPatches has it, made with its own temporal), not both")
        if position_ids is not None and hasattr(self, "head"):
            raise ValueError("position_ids: which rows an image pools is not known; load with vision_use_head=False")
        if position_ids is not None and not pixel_values.is_meta:
            check_numbers(position_ids, "position_ids")
        return make_layout(
            grid_thw,
            total_patches=pixel_values.shape[0],
            temporal="frames" if temporal is None else temporal,
            cu_seqlens=cu_seqlens,
            max_seqlen=max_seqlen,
            position_ids=position_ids,
        )

    @torch.compiler.disable
    def _attention(self, segments: Segments) -> VarlenAttention:
        """What runs for these segments: the backend of `attn_implementation`, checked, in the dtype of the weights."""
        vars(self.config).pop("_attn_was_changed", None)  # transformers 4 leaves it, and then never sets it again
        device, dtype = segments.device.type, self.embeddings.compute_dtype
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        heads, requested = self.config.num_attention_heads, requested_attention(self.config)
        learns, invariant = torch.is_grad_enabled(), invariance.asked(self.config)
        return for_pack(segments, requested, dtype, heads, head_dim(self.config), learns, invariant)

    def get_correct_attn_implementation(self, requested_attention: str | None, *args: Any, **kwargs: Any) -> str:
        """transformers asks here, at construction and from a model around this one, whether it may use a backend."""
        return attention_name(requested_attention)

    _check_and_adjust_attn_implementation = get_correct_attn_implementation  # type: ignore[assignment]

    def set_attn_implementation(self, attn_implementation: str | dict, *args: Any, **kwargs: Any) -> None:
        """One of `"auto"`, `"triton"`, `"sdpa"`, ...: see `siglip2-packed doctor`."""
        given = attn_implementation
        name = given.get("", requested_attention(self.config)) if isinstance(given, dict) else given
        self.config._attn_implementation = attention_name(name)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """transformers' initialisation of the same modules (a model made from a config alone)."""
        if isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.hidden_size**-0.5)
        elif module is self.get_input_embeddings():  # as LeCun's
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear")  # type: ignore[arg-type]
            nn.init.zeros_(module.bias)  # type: ignore[arg-type]
        elif isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, PoolingAttention):
            nn.init.xavier_uniform_(module.in_proj_weight)
            nn.init.zeros_(module.in_proj_bias)
        elif isinstance(module, Siglip2PackedPoolingHead):
            nn.init.xavier_uniform_(module.probe)


class Siglip2NaflexPacking(nn.Module):
    """Token features of packed patches: `model(hidden_states [T, P], grid_thw [N, 3]) -> [T, D]`.

    Args:
        ckpt: local folder or hub id.
        device: where to put the model; CUDA if there is one, else the CPU.
        **kwargs: those of `Siglip2PackedVisionModel.from_pretrained`.

    Raises:
        FileNotFoundError, ValueError: those of `Siglip2PackedVisionModel.from_pretrained`, and of its forward.

    Examples:
        >>> import torch
        >>> from siglip2_packed import Siglip2NaflexPacking
        >>> model = Siglip2NaflexPacking("google/siglip2-so400m-patch16-naflex", device="cpu")
        >>> model(torch.zeros(26, 768), torch.tensor([[1, 2, 3], [1, 4, 5]])).shape == (26, model.config.hidden_size)
        True
    """

    def __init__(
        self,
        ckpt: str | os.PathLike = "google/siglip2-so400m-patch16-naflex",
        device: torch.device | str | None = None,
        **kwargs: Any,
    ):
        super().__init__()
        kwargs = {"vision_use_head": False, **kwargs}
        self.vision_model = Siglip2PackedVisionModel.from_pretrained(ckpt, **kwargs)
        self.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval()

    @classmethod
    def from_pretrained(cls, ckpt: str | os.PathLike, **kwargs: Any) -> Siglip2NaflexPacking:
        return cls(ckpt, **kwargs)

    @property
    def config(self) -> Siglip2VisionConfig:
        return self.vision_model.config

    if TYPE_CHECKING:

        def __call__(self, hidden_states: Tensor, grid_thw: GridLike, **kwargs: Any) -> Tensor: ...

    def forward(self, hidden_states: Tensor, grid_thw: Any, **kwargs: Any) -> Tensor:
        """`[T, P]` patches and `[N, 3]` grids -> `[T, D]`, the last hidden state after post_layernorm."""
        return self.vision_model(hidden_states, grid_thw, **kwargs, return_dict=True).last_hidden_state


__all__ = ["NoPoolingHead", "Siglip2NaflexPacking", "Siglip2PackedVisionModel", "layer_index"]
