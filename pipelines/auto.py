"""`AutoPipelineFor….from_pipe` of diffusers, from and to pipelines of ours."""

from __future__ import annotations

from diffusers.pipelines import auto_pipeline


def register(
    name: str, *, text_to_image: type, image_to_image: type | None = None, inpainting: type | None = None
) -> None:
    """Tells diffusers which pipelines of ours are one model's, so that it finds the one for another task.

    Args:
        name: Of the model, as nobody else calls it.
        text_to_image, image_to_image, inpainting: The pipelines; ``None`` where diffusers has none.
    """
    auto_pipeline.AUTO_TEXT2IMAGE_PIPELINES_MAPPING[name] = text_to_image
    if image_to_image is not None:
        auto_pipeline.AUTO_IMAGE2IMAGE_PIPELINES_MAPPING[name] = image_to_image
    if inpainting is not None:
        auto_pipeline.AUTO_INPAINT_PIPELINES_MAPPING[name] = inpainting
