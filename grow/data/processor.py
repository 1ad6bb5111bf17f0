"""The processor of a checkpoint, as far as it is for images."""

from functools import cache
from typing import Any

from transformers import AutoConfig, AutoImageProcessor, AutoProcessor, AutoTokenizer
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

from grow.checkpoint.hub import FROM_FOLDER
from grow.errors import UserError, innermost

KNOWN = ("Gemma3Processor", "Gemma4Processor", "LlavaProcessor")
"""Processors that write nothing but each image's own tokens, and make one row of each tensor for it."""


def processor_of_images(folder: str) -> Any:
    """Returns a checkpoint's processor. Raises UserError where it has none for images, or one that is not known
    here."""
    found = _loaded(folder)
    if not hasattr(found, "image_processor"):
        raise UserError(f"images: {folder}: has no processor for images; it is a model of text alone")
    name = type(found).__name__
    if name not in KNOWN:
        raise UserError(
            f"images: {folder}: how {name} writes images into a text is not known here; that of "
            f"{', '.join(KNOWN[:-1])} and {KNOWN[-1]} is"
        )
    return found


@cache
def _loaded(folder: str) -> Any:
    """Loads a processor, which brings a tokenizer of its own, once for all splits."""
    try:
        return AutoProcessor.from_pretrained(folder, **FROM_FOLDER)
    except Exception as error:  # the library raises many kinds, all of them about what is in the folder
        try:
            return _without_video(folder)
        except Exception:
            raise UserError(f"images: {folder}: has no processor for images ({innermost(error)})") from error


def _without_video(folder: str) -> Any:
    """Loads a Gemma 4's processor without its parts for video, which need torchvision, and for sound."""
    cls: Any = PROCESSOR_MAPPING[type(AutoConfig.from_pretrained(folder, **FROM_FOLDER))]
    parts = [kind.from_pretrained(folder, **FROM_FOLDER) for kind in (AutoImageProcessor, AutoTokenizer)]
    made = cls.__new__(cls)
    made.check_argument_for_proper_class = lambda *_: None  # it does not know of parts that are left out
    cls.__init__(made, feature_extractor=None, image_processor=parts[0], tokenizer=parts[1], video_processor=None)
    del made.check_argument_for_proper_class
    return made
