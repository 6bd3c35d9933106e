"""Configuration of the vision Transformer: named sizes, where its SMoE layers are, and their options."""

from __future__ import annotations

import inspect
import re
from dataclasses import asdict
from typing import Any, NamedTuple, get_args

from huggingface_hub.dataclasses import strict

from s2moe.models.configuration import meta_router
from s2moe.models.vision.base import VisionConfig
from s2moe.moe.config import MoEConfig, method_of, resolve_moe, typed_moe
from s2moe.moe.expert_product import ACTIVATIONS
from s2moe.moe.routers import ROUTERS
from s2moe.moe.routers.vmoe import VMoERouter
from s2moe.options import LARGEST, check_fields, deep_merge, nearest, option


class ViTSize(NamedTuple):
    """A named size: patch in pixels, width, blocks, heads, hidden width of the MLP."""

    patch_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int


SIZES = {
    "digits/2": ViTSize(2, 32, 4, 4, 128),  # for 8x8 images: 16 patches
    "mnist/4": ViTSize(4, 64, 4, 4, 256),  # for 28x28: 49
    "cifar/4": ViTSize(4, 128, 6, 4, 512),  # for 32x32: 64
    "S/32": ViTSize(32, 512, 8, 8, 2048),
    "B/32": ViTSize(32, 768, 12, 12, 3072),
    "B/16": ViTSize(16, 768, 12, 12, 3072),
    "L/32": ViTSize(32, 1024, 24, 16, 4096),
    "L/16": ViTSize(16, 1024, 24, 16, 4096),
    "H/14": ViTSize(14, 1280, 32, 16, 5120),
}


@strict
class VMoEConfig(VisionConfig):
    """A vision Transformer. ``moe`` holds the resolved options of ``s2moe.moe.config``.

    Raises:
        ValueError: on impossible sizes or unknown options, naming the key.
    """

    model_type = "s2moe_vmoe"

    size: str = option("mnist/4", "a named size, for those of the next five that are null")
    patch_size: int | None = option(
        None, "height and width of a patch in pixels; null: the named size's", least=1, most=LARGEST
    )
    hidden_size: int | None = option(None, "width of the model; null: the named size's", least=1, most=LARGEST)
    num_hidden_layers: int | None = option(None, "Transformer blocks; null: the named size's", least=1, most=LARGEST)
    num_attention_heads: int | None = option(None, "attention heads; null: the named size's", least=1, most=LARGEST)
    intermediate_size: int | None = option(
        None, "hidden width of MLPs and experts; null: the named size's", least=1, most=LARGEST
    )
    placement: str = option(
        "every-2",
        "which blocks have experts: every-n: blocks n-1, 2n-1, ... counted from 0; last-n: the last n odd blocks; "
        "none: a dense ViT",
    )
    activation: str = option("gelu", "of MLPs and experts (the released code: gelu_tanh)", choices=ACTIVATIONS)
    layer_norm_eps: float = option(1e-6, "epsilon of LayerNorm", above=0, most=1)
    dropout: float = option(
        0.0, "dropout of the embedding, of attention's output and within dense MLPs", least=0, below=1
    )
    representation_size: int | None = option(
        None, "width of a tanh layer before the head; null: none", least=1, most=LARGEST
    )
    loss: str = option(
        "softmax",
        "softmax: cross-entropy; sigmoid: cross-entropy of each class by itself, summed (V-MoE's pre-training)",
        choices=("softmax", "sigmoid"),
    )
    head_bias: float | None = option(None, "where the head's bias starts; null: -log(classes) (ImageNet-21k: -10)")
    auxiliary: str | None = option(
        None,
        "how the auxiliary losses of SMoE layers are put together: sum or mean; null: sum with moe.method=vmoe, as "
        "published, else mean, as in the language model",
        choices=("sum", "mean"),
        needs="SMoE layers",
    )
    initializer_range: float | None = option(
        None, "standard deviation of the initial weights; null: Xavier's by each matrix' shape", least=0
    )
    moe: dict | None = option(None, "the SMoE layers; method vmoe, 8 experts of the MLP's form and width by default")

    def __post_init__(self, **kwargs: Any) -> None:
        self._check_types()
        if self.size not in SIZES:
            raise ValueError(
                f"size: unknown size {self.size!r}{nearest(self.size, SIZES)}; known: {', '.join(SIZES)} (or set "
                "patch_size, hidden_size, num_hidden_layers, num_attention_heads and intermediate_size)"
            )
        for name, value in SIZES[self.size]._asdict().items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        self._check_ranges()
        every, first_dense = self._layout()
        given = dict(self.moe or {})
        for name, value in (("every", every), ("first_dense", first_dense)):
            if given.get(name, value) != value:
                raise ValueError(
                    f"moe.{name}={given[name]}: placement decides which blocks have experts, and placement="
                    f"{self.placement} makes it {value}: leave moe.{name} alone"
                )
        defaults = {
            "method": method_of(given, "vmoe"),
            "num_experts": 8,
            "expert_hidden": self.intermediate_size,
            "expert_form": "mlp_biases",
            "activation": self.activation,
            "every": every,
            "first_dense": first_dense,
        }
        moe = resolve_moe(deep_merge(defaults, given))
        assert self.hidden_size is not None
        if ROUTERS[moe.router["name"]].keeps_history:
            raise ValueError(
                f"moe.router.name={moe.router['name']} routes by token ids or by earlier tokens of a text, and "
                "the patches of an image have neither: choose another moe.method"
            )
        meta_router(moe, self.hidden_size)  # raises where its options and the model's sizes do not fit together
        self.moe = asdict(moe)
        super().__post_init__(**kwargs)

    def _layout(self) -> tuple[int, int]:
        """``every`` and ``first_dense`` of the SMoE layers that ``placement`` names."""
        layers = self.num_hidden_layers
        assert layers is not None
        if self.placement == "none":
            return 1, layers
        found = re.fullmatch(r"(every|last)-([1-9]\d*)", self.placement)
        if not found:
            raise ValueError(f"placement: must be every-n, last-n or none, got {self.placement!r}; e.g. every-2")
        count = int(found[2])
        most = layers if found[1] == "every" else layers // 2
        if count > most:
            raise ValueError(
                f"placement={self.placement}: {layers} blocks have room for at most {found[1]}-{most}"
                + (" (the odd ones)" if found[1] == "last" else "")
            )
        return (count, 0) if found[1] == "every" else (2, 2 * (most - count))

    def _check_types(self) -> None:
        base, own = (inspect.get_annotations(cls, eval_str=True) for cls in (VisionConfig, VMoEConfig))
        hints = {**base, **own}
        for name, hint in hints.items():
            allowed, value = get_args(hint) or (hint,), getattr(self, name, None)
            if isinstance(value, int) and not isinstance(value, bool) and float in allowed:
                continue
            if (type(value) is bool and bool not in allowed) or not isinstance(value, allowed):
                names = " or ".join(getattr(kind, "__name__", str(kind)) for kind in allowed)
                raise ValueError(f"{name}: expected {names}, got {value!r}")

    def _check_ranges(self) -> None:
        check_fields(self)
        assert self.patch_size is not None
        assert self.hidden_size is not None
        assert self.num_attention_heads is not None
        if self.image_size % self.patch_size:
            raise ValueError(
                f"patch_size {self.patch_size} does not divide image_size {self.image_size}: choose a size whose "
                "patches do, or set patch_size"
            )
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}"
            )

    def sizes(self) -> ViTSize:
        """The resolved sizes."""
        return ViTSize(*(getattr(self, name) for name in ViTSize._fields))

    @property
    def patches(self) -> int:
        """P: patches of an image."""
        return (self.image_size // self.sizes().patch_size) ** 2

    def moe_config(self) -> MoEConfig:
        """The typed options of the SMoE layers."""
        assert self.moe is not None  # set in __post_init__
        return typed_moe(self.moe)

    def check_micro_batch(self, images: int) -> None:
        """Raise ValueError if the router cannot train on micro-batches of so many images."""
        assert self.hidden_size is not None
        router = meta_router(self.moe_config(), self.hidden_size)
        if isinstance(router, VMoERouter) and self.placement != "none":
            router.require_places(images * (self.patches + 1), images)

    def auxiliary_sum(self) -> bool:
        """Whether the layers' auxiliary losses are summed, not averaged."""
        return (self.auxiliary or ("sum" if self.moe_config().method == "vmoe" else "mean")) == "sum"
