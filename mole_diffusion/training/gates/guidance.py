"""What CLIP says about the pictures that gates draw: the prompt as a whole, each concept, each concept's identity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mole_diffusion.clip import DifferentiableCLIP
from mole_diffusion.errors import MoLEError
from mole_diffusion.training.gates.concepts import Concept, text_for_clip
from mole_diffusion.training.gates.config import GateTrainingConfig
from mole_diffusion.training.gates.objective import Drawn


class Guidance:
    """L_D of eq. 16 of "Mixture of LoRA Experts" (https://openreview.net/forum?id=uWvKBCYh4S), "global and local".

    - global: `1 - cos(I, T)`, I the drawn picture and T the prompt in CLIP's words.
    - local: `1 - cos(I - I_c, T - T_c)`, the directional loss of StyleGAN-NADA (arXiv 2108.00946) from concept c alone,
      its reference pictures and its words, to the picture and the prompt.
    - identity: `1 - max_k cos(I_k, I_c)` over crops k of the drawn picture.

    The last two are means over the concepts that the prompt calls by their tokens. Terms of weight 0 are not computed.

    Args:
        clip: The CLIP that judges.
        config: Weights of the terms.
        prompts: The prompts as the base model reads them.
        concepts: What each LoRA stands for, by its name.
        references: Name to CLIP features of the concept's pictures, (pictures, width); read by local and identity.

    Raises:
        MoLEError: A term needs concepts, and a prompt calls none.
    """

    def __init__(
        self,
        clip: DifferentiableCLIP,
        config: GateTrainingConfig,
        prompts: Sequence[str],
        concepts: Mapping[str, Concept],
        references: Mapping[str, Tensor],
    ) -> None:
        self.clip = clip
        self.config = config
        self.texts = [text_for_clip(prompt, concepts) for prompt in prompts]
        self.text_features = clip.encode_text(self.texts)  # T, (prompts, width)
        if not needs_references(config):
            return
        called = [[concept.is_in(prompt) for concept in concepts.values()] for prompt in prompts]
        for prompt, calls in zip(prompts, called, strict=True):
            if not any(calls):
                raise MoLEError(
                    f"The local and identity terms compare with the concepts a prompt calls, and {prompt!r} has none "
                    f"of the tokens {[concept.token for concept in concepts.values()]}. Put tokens into every prompt, "
                    "give `concepts` for all of them, or set `local_weight` and `identity_weight` to 0."
                )
        device = self.text_features.device
        self.called = torch.tensor(called, device=device).to(self.text_features)  # (prompts, concepts)
        pictures = torch.stack([references[name].mean(dim=0) for name in concepts])
        self.references = F.normalize(pictures.to(device), dim=-1)  # I_c, (concepts, width)
        alone = clip.encode_text([f"a photo of a {concept.words}" for concept in concepts.values()])
        self.directions = F.normalize(self.text_features[:, None] - alone, dim=-1)  # (prompts, concepts, width)

    def loss(self, drawn: Drawn) -> tuple[Tensor, dict[str, Tensor]]:
        """L_D as a mean over the pictures, and the mean of each term."""
        terms = self.terms(drawn.images, drawn.prompts)
        return self.weigh(terms).mean(), {name: term.mean() for name, term in terms.items()}

    def made_of(self) -> dict[str, list[Tensor] | list[str]]:
        """CLIP's weights, and what it reads."""
        return {"the CLIP": list(self.clip.state_dict().values()), "what CLIP reads": self.texts}

    def terms(self, images: Tensor, chosen: Sequence[int]) -> dict[str, Tensor]:
        """Every term of weight above 0, each (batch,), fp32.

        Args:
            images: (batch, 3, height, width) in [0, 1].
            chosen: Index of each picture's prompt.
        """
        rows = torch.as_tensor(chosen, device=self.text_features.device)
        features = self.clip.encode_image(images).float()  # I, (batch, width)
        terms = {}
        if self.config.global_weight:
            terms["global"] = 1 - (features * self.text_features[rows].float()).sum(-1)
        if self.config.local_weight:
            moved = F.normalize(features[:, None] - self.references.float(), dim=-1)  # (batch, concepts, width)
            terms["local"] = self._mean_over_called(1 - (moved * self.directions[rows].float()).sum(-1), rows)
        if self.config.identity_weight:
            nearest = self._nearest(crop_grid(images, self.config.identity_crops), rows)
            terms["identity"] = self._mean_over_called(1 - nearest, rows)
        return terms

    def weigh(self, terms: Mapping[str, Tensor]) -> Tensor:
        """L_D of each picture, (batch,)."""
        weights = {
            "global": self.config.global_weight,
            "local": self.config.local_weight,
            "identity": self.config.identity_weight,
        }
        total = torch.stack([weights[name] * term for name, term in terms.items()]).sum(dim=0)
        if self.config.loss_shape == "linear":
            return total
        # The released code takes the logarithm of what may be negative, and its training then ends in NaN.
        return -((2.5 - total) / 2).clamp_min(0.01).log()

    def _nearest(self, crops: Tensor, rows: Tensor) -> Tensor:
        """Cosine of each concept to the crop that is nearest to it, (batch, concepts).

        The gradient goes through that crop alone. So all are looked at without one, and CLIP keeps what the backward
        pass reads of two or three crops of a picture instead of all nine.
        """
        references, flat = self.references.float(), crops.flatten(0, 1)
        with torch.no_grad():
            found = self.clip.encode_image(flat).float().unflatten(0, crops.shape[:2])
            cosines = (found[:, :, None] * references).sum(-1)  # (batch, crops, concepts)
        if not (torch.is_grad_enabled() and crops.requires_grad):
            return cosines.amax(dim=1)
        first = torch.arange(0, len(flat), crops.shape[1], device=cosines.device)[:, None]
        nearest = first + cosines.argmax(dim=1)  # among the crops of all pictures, (batch, concepts)
        called = self.called[rows] > 0
        chosen = nearest[called].unique()
        which = torch.searchsorted(chosen, nearest.where(called, chosen[0]))  # a concept not called counts for nothing
        return (self.clip.encode_image(flat[chosen]).float()[which] * references).sum(-1)

    def _mean_over_called(self, values: Tensor, rows: Tensor) -> Tensor:
        """(batch, concepts) to (batch,): the mean over the concepts that each prompt calls."""
        called = self.called[rows].float()
        return (values * called).sum(-1) / called.sum(-1)


def needs_references(config: GateTrainingConfig) -> bool:
    """Whether a term compares with pictures of the concepts."""
    return config.local_weight > 0 or config.identity_weight > 0


def crop_grid(images: Tensor, per_side: int) -> Tensor:
    """Crops half as high and wide, `per_side` rows and columns of them: (batch, crops, 3, h / 2, w / 2)."""
    height, width = images.shape[-2] // 2, images.shape[-1] // 2

    def starts(room: int) -> list[int]:
        return [round(room * k / (per_side - 1)) if per_side > 1 else room // 2 for k in range(per_side)]

    return torch.stack(
        [
            images[..., top : top + height, left : left + width]
            for top in starts(images.shape[-2] - height)
            for left in starts(images.shape[-1] - width)
        ],
        dim=1,
    )
