"""A pipeline folder's scheduler_config.json: which solver the model is sampled with, and its settings."""

import pathlib
from collections.abc import Mapping

from sana_jax.weights import setting_rules
from sana_jax.weights.model_index import read_json

# What a diffusers scheduler must say to be one of our solvers; the other keys do not bear on flow models.
_DPM_FIXED = {
    "algorithm_type": "dpmsolver++",
    "solver_type": "midpoint",
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
    "final_sigmas_type": "zero",
    "num_train_timesteps": 1000,
    "lower_order_final": True,
    "euler_at_final": False,
    "thresholding": False,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "use_lu_lambdas": False,
    "use_dynamic_shifting": False,
}
_DPM_REQUIRED = ("prediction_type", "use_flow_sigmas")  # diffusers' own defaults are another solver's
_EULER_FIXED = {
    "num_train_timesteps": 1000,
    "use_dynamic_shifting": False,
    "invert_sigmas": False,
    "shift_terminal": None,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "stochastic_sampling": False,
}
_SCM_FIXED = {"num_train_timesteps": 1000, "prediction_type": "trigflow", "sigma_data": 0.5}
# The public conversion script gives these to the scheduler too, which takes them from the pipeline's call only.
_SCM_OF_THE_CALL = {"max_timesteps": 1.57080, "intermediate_timesteps": 1.3}
_RULES = {
    "DPMSolverMultistepScheduler": {
        "solver_order": setting_rules.one_of(2, 1, 3),
        "flow_shift": setting_rules.number(3.0, positive=True),
    },
    "FlowMatchEulerDiscreteScheduler": {"shift": setting_rules.number(3.0, positive=True)},
}


def scheduler_to_json(solver: str, solver_order: int, flow_shift: float) -> dict:
    """The scheduler_config.json that diffusers reads."""
    if solver == "scm":
        return {"_class_name": "SCMScheduler", **_SCM_FIXED}
    if solver == "flow_euler":
        return {"_class_name": "FlowMatchEulerDiscreteScheduler", **_EULER_FIXED, "shift": flow_shift}
    return {
        "_class_name": "DPMSolverMultistepScheduler",
        **_DPM_FIXED,
        "solver_order": solver_order,
        "flow_shift": flow_shift,
    }


def scheduler_from_json(file: pathlib.Path) -> dict:
    """The fields of `SamplingDefaults` that a scheduler_config.json determines.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: a scheduler, or a setting of one, that is not implemented, or a value that no solver can use.
    """
    values = read_json(file)
    name = values.get("_class_name")
    if name == "DPMSolverMultistepScheduler":
        fixed = _DPM_FIXED
        fields = {
            "solver": "flow_dpm",
            "solver_order": values.get("solver_order", 2),
            "flow_shift": values.get("flow_shift", 1.0),
        }
        values = {key: None for key in _DPM_REQUIRED} | values
    elif name == "FlowMatchEulerDiscreteScheduler":
        fixed = _EULER_FIXED
        # Unlike the other one, it hands its timesteps on as they are.
        fields = {"solver": "flow_euler", "flow_shift": values.get("shift", 1.0), "integer_timesteps": False}
    elif name == "SCMScheduler":
        fixed = _SCM_FIXED | _SCM_OF_THE_CALL
        fields = {"solver": "scm"}
    else:
        raise ValueError(
            f"{file} asks for the scheduler {name}; implemented are DPMSolverMultistepScheduler, "
            "FlowMatchEulerDiscreteScheduler and SCMScheduler."
        )
    for key, wanted in fixed.items():
        if key in values and values[key] != wanted:
            raise ValueError(f"{file} has {key}={values[key]!r}; the solvers here implement {wanted!r} only.")
    check_scheduler(file, values)
    return fields


def check_scheduler(file: pathlib.Path, values: Mapping) -> None:
    """Raises ValueError where the order or the shift in a scheduler_config.json is one that no solver can use."""
    setting_rules.check(file, values, _RULES.get(values["_class_name"], {}))
