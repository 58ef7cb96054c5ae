"""The top of a recipe: its own settings, beside the stages."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from align.recipe.data_settings import Data
from align.recipe.engine_settings import EvaluationSettings
from align.recipe.launch_settings import LaunchSettings, NodesSettings
from align.recipe.settings import Settings, execution
from align.recipe.submit_settings import SubmitSettings
from align.recipe.training_settings import Model


class RecipeSettings(Settings):
    """The recipe's own fields. Every other top-level key of the YAML is a stage: its name, or `kind:` inside
    it, is the kind of stage it is."""

    name: str = "run"
    """Name of the run's folder, unless --run is given."""

    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of everything random. A stage may have its own."""

    model: Model | None = None
    """The model that stages start from when no stage before them makes one."""

    data: Data | None = None
    """The data of stages that name no files. What such a stage says of its `data` is changed for it alone."""

    evaluation: EvaluationSettings = EvaluationSettings()
    """How every policy is measured at the end of its stage."""

    track: list[Literal["tensorboard", "wandb", "mlflow", "trackio"]] = execution([])
    """Where metrics go besides metrics.jsonl."""

    submit: SubmitSettings = execution(SubmitSettings())
    """What `align submit` asks of a cluster."""

    launch: LaunchSettings = execution(LaunchSettings())
    """Processes of every stage that has no `launch` of its own."""

    nodes: NodesSettings = execution(NodesSettings())
    """Machines that these processes are on."""
