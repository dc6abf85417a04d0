"""`AutoPipelineFor….from_pipe` of diffusers, from and to pipelines of ours."""

from __future__ import annotations

from diffusers.pipelines import auto_pipeline


def register(
    name: str, *, text_to_image: type, image_to_image: type | None = None, inpainting: type | None = None
) -> None:
    """Tells diffusers which pipelines of ours are one model's, so that it finds the one for another task.

    Args:
        name: A name for the model that diffusers does not use itself.
        text_to_image: The pipeline that draws from a prompt.
        image_to_image: The one that begins with a picture; `None` where diffusers has none.
        inpainting: The one that draws into a picture; `None` where diffusers has none.
    """
    for mapping, pipeline in (
        (auto_pipeline.AUTO_TEXT2IMAGE_PIPELINES_MAPPING, text_to_image),
        (auto_pipeline.AUTO_IMAGE2IMAGE_PIPELINES_MAPPING, image_to_image),
        (auto_pipeline.AUTO_INPAINT_PIPELINES_MAPPING, inpainting),
    ):
        if pipeline is not None:
            mapping[name] = pipeline
