"""How well a composition did: the numbers of the paper, and those of the toybox, where the truth is known.

Each metric is a pure function and a `torchmetrics.Metric`, whose result is the same in one process and in several.
"""

from __future__ import annotations

from ..extras import needs

with needs("metrics", "measuring"):
    from ..pictures import picture_files, read_picture
    from .alignment import ImageAlignment, TextAlignment, image_alignment, text_alignment
    from .encoders import ImageEncoder, TextImageEncoder, VisionBackbone, load_clip
    from .features import embed_images
    from .folder import Evaluation, evaluate_folder
    from .gates import GateReport, GateStatistics, gate_statistics
    from .pictures import Pictures
    from .presence import ConceptPresence, concept_presence
    from .region import Detector, RegionAlignment, oracle_detector, reference_regions, region_alignment

__all__ = [
    "ConceptPresence",
    "Detector",
    "Evaluation",
    "GateReport",
    "GateStatistics",
    "ImageAlignment",
    "ImageEncoder",
    "Pictures",
    "RegionAlignment",
    "TextAlignment",
    "TextImageEncoder",
    "VisionBackbone",
    "concept_presence",
    "embed_images",
    "evaluate_folder",
    "gate_statistics",
    "image_alignment",
    "load_clip",
    "oracle_detector",
    "picture_files",
    "read_picture",
    "reference_regions",
    "region_alignment",
    "text_alignment",
]
