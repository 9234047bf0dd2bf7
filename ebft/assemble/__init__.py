"""From the command line's options to the parts of a run; what needs no model is checked before one is loaded."""

from ebft.assemble.ablate import ablate, ablate_from_options
from ebft.assemble.checks import GROUPS, check_options, resolve_run, settle
from ebft.assemble.compare import compare_from_options
from ebft.assemble.data import list_data_sets, print_card
from ebft.assemble.evaluate import evaluate_from_options
from ebft.assemble.loss import build_controller, build_loss, build_schedules
from ebft.assemble.optimizer import build_average, build_optimizer
from ebft.assemble.pipeline import build_features, build_pipeline, training_stages
from ebft.assemble.plan import plan_from_options
from ebft.assemble.policy import load_policy
from ebft.assemble.replay import replay, replay_from_options
from ebft.assemble.reward import build_reward, build_values
from ebft.assemble.rollouts import rollouts_from_options
from ebft.assemble.rows import pack_data, read_data
from ebft.assemble.run import run_from_options
from ebft.assemble.sample import sample_from_options
from ebft.assemble.signal import signal_from_options
from ebft.assemble.tilt import tilt_from_options

__all__ = [
    "GROUPS",
    "ablate",
    "ablate_from_options",
    "build_average",
    "build_controller",
    "build_features",
    "build_loss",
    "build_optimizer",
    "build_pipeline",
    "build_reward",
    "build_schedules",
    "build_values",
    "check_options",
    "compare_from_options",
    "evaluate_from_options",
    "list_data_sets",
    "load_policy",
    "pack_data",
    "plan_from_options",
    "print_card",
    "read_data",
    "replay",
    "replay_from_options",
    "resolve_run",
    "rollouts_from_options",
    "run_from_options",
    "sample_from_options",
    "settle",
    "signal_from_options",
    "tilt_from_options",
    "training_stages",
]
