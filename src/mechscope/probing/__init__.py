"""What a model's activations tell of its texts: probes, linear and with a hidden layer, beside controls; and erasing what they tell."""

from mechscope.probing.activations import Activations, Component, ProbeSite, components_of
from mechscope.probing.amnesic import component_of, erased, erasing
from mechscope.probing.controls import untrained
from mechscope.probing.erasure import Eraser, erase_means, erase_random, inlp, leace
from mechscope.probing.linear import PENALTIES, LinearProbe, chosen_penalties, difference_in_means, lda, mass_mean, r_squared, ridge
from mechscope.probing.logistic import logistic
from mechscope.probing.mlp import MlpProbe, mlp
from mechscope.probing.passes import Method
from mechscope.probing.probe import Probing, probe
from mechscope.probing.tasks import Task, document_task, task_of, token_task

__all__ = [
    "PENALTIES",
    "Activations",
    "Component",
    "Eraser",
    "LinearProbe",
    "Method",
    "MlpProbe",
    "ProbeSite",
    "Probing",
    "Task",
    "chosen_penalties",
    "component_of",
    "components_of",
    "difference_in_means",
    "document_task",
    "erase_means",
    "erase_random",
    "erased",
    "erasing",
    "inlp",
    "lda",
    "leace",
    "logistic",
    "mass_mean",
    "mlp",
    "probe",
    "r_squared",
    "ridge",
    "task_of",
    "token_task",
    "untrained",
]
