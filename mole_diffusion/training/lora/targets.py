"""The modules that a LoRA of Stable Diffusion is trained on where nobody says otherwise."""

from mole_diffusion.families.clip import CLIPText
from mole_diffusion.families.unet import UNet

UNET_TARGETS, TEXT_ENCODER_TARGETS = UNet.targets, CLIPText.targets
