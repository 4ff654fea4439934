"""What the scripts share: options, the model they name, writing pictures, reporting errors.

Nothing heavy is imported until it is needed, so that `--help` answers at once.
"""

from ldm.cli.conditions import add_conditions, conditions_for, read_conditions
from ldm.cli.manifest import add_resume, descriptions
from ldm.cli.models import load_model, model_name, resumed
from ldm.cli.options import (
    MAX_SEED,
    PROMPT,
    ArgumentParser,
    add_amount,
    add_clip,
    add_model,
    add_output,
    add_prompt,
    add_reading,
    add_sampler,
    add_size,
    add_tile,
    add_trust,
    is_setting,
    number,
    parse,
    reading_options,
    sampling_metadata,
    sampling_options,
    sampling_parser,
    user_path,
)
from ldm.cli.pictures import Watch, add_preview, add_seeding, add_tiling, seeding, settings_of
from ldm.cli.prompts import Batch, batches, combinations, prompt_batches
from ldm.cli.reporting import FAREWELL, run, say
from ldm.cli.sample_writer import RunWriter
from ldm.cli.speed import add_speed, shortcuts, take
from ldm.cli.writing import AnimationWriter, Interrupted, NamedWriter, SampleWriter, make_folder

__all__ = [
    "FAREWELL",
    "MAX_SEED",
    "PROMPT",
    "AnimationWriter",
    "ArgumentParser",
    "Batch",
    "Interrupted",
    "NamedWriter",
    "RunWriter",
    "SampleWriter",
    "Watch",
    "add_amount",
    "add_clip",
    "add_conditions",
    "add_model",
    "add_output",
    "add_preview",
    "add_prompt",
    "add_reading",
    "add_resume",
    "add_sampler",
    "add_seeding",
    "add_size",
    "add_speed",
    "add_tile",
    "add_tiling",
    "add_trust",
    "batches",
    "combinations",
    "is_setting",
    "conditions_for",
    "descriptions",
    "load_model",
    "make_folder",
    "model_name",
    "number",
    "parse",
    "prompt_batches",
    "read_conditions",
    "reading_options",
    "resumed",
    "run",
    "sampling_metadata",
    "sampling_options",
    "sampling_parser",
    "say",
    "seeding",
    "settings_of",
    "shortcuts",
    "take",
    "user_path",
]
