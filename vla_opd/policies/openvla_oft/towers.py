"""DINOv2 and SigLIP from stock transformers modules, as OpenVLA-OFT uses them, and the projector.

Features are those of the second-to-last block. The last block, the final norm and SigLIP's pooling
are never read, so they are not built.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import (
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.models.dinov2_with_registers.modeling_dinov2_with_registers import (
    Dinov2WithRegistersEmbeddings,
)

from vla_opd.policies.openvla_oft.layout import Tower

SIZE = 224  # pixels, of an image's width and height
PATCH = 14  # pixels
PATCHES = (SIZE // PATCH) ** 2
REGISTERS = 4
SIGLIP_MLP = 3.7362  # hidden units per unit of width


def build_dino(tower: Tower) -> Dinov2WithRegistersModel:
    """Build DINOv2 with registers, up to its second-to-last block."""
    config = Dinov2WithRegistersConfig(
        hidden_size=tower.width,
        num_hidden_layers=tower.depth - 1,
        num_attention_heads=tower.heads,
        num_register_tokens=REGISTERS,
        image_size=SIZE,
        patch_size=PATCH,
        layer_norm_eps=1e-6,
        attn_implementation="sdpa",  # pyright: ignore[reportCallIssue] - of the base class
    )
    model = Dinov2WithRegistersModel(config)
    model.embeddings = PatchPositions(model.config)
    model.layernorm = nn.Identity()  # pyright: ignore[reportAttributeAccessIssue]
    return model


class PatchPositions(Dinov2WithRegistersEmbeddings):
    """Embeddings with positions for the patches only, as in the original.

    The stock embeddings have a position for the class token too, which would be trained.
    """

    def __init__(self, config: Dinov2WithRegistersConfig) -> None:
        super().__init__(config)
        self.mask_token = None
        self.position_embeddings = nn.Parameter(torch.zeros(1, PATCHES, config.hidden_size))

    def interpolate_pos_encoding(
        self,
        embeddings: Float[Tensor, "B N W"],  # noqa: ARG002
        height: int,  # noqa: ARG002
        width: int,  # noqa: ARG002
    ) -> Float[Tensor, "1 N W"]:
        """Return the positions without interpolation: images have one size."""
        return nn.functional.pad(self.position_embeddings, (0, 0, 1, 0))


def build_siglip(tower: Tower) -> SiglipVisionModel:
    """Build SigLIP up to its second-to-last block, with the exact GELU as in the original."""
    config = SiglipVisionConfig(
        hidden_size=tower.width,
        intermediate_size=int(tower.width * SIGLIP_MLP),
        num_hidden_layers=tower.depth - 1,
        num_attention_heads=tower.heads,
        image_size=SIZE,
        patch_size=PATCH,
        hidden_act="gelu",
        layer_norm_eps=1e-6,
        vision_use_head=False,
        attn_implementation="sdpa",  # pyright: ignore[reportCallIssue] - of the base class
    )
    model = SiglipVisionModel(config)
    model.post_layernorm = nn.Identity()  # pyright: ignore[reportAttributeAccessIssue]
    return model


class Projector(nn.Module):
    """Three linear layers with GELU between them: F -> 4 F -> H -> H."""

    def __init__(self, features: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(features, 4 * features)
        self.fc2 = nn.Linear(4 * features, hidden)
        self.fc3 = nn.Linear(hidden, hidden)

    def forward(self, features: Float[Tensor, "B P F"]) -> Float[Tensor, "B P H"]:
        """Project patch features to embeddings of the language model."""
        gelu = nn.functional.gelu
        return self.fc3(gelu(self.fc2(gelu(self.fc1(features)))))
