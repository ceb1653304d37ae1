"""What does not go with an nGPT besides its model's own fields."""

from toolkit.errors import ConfigError, ErrorList
from toolkit.experiment.config import ExperimentConfig
from toolkit.models.config import ModuleConfig


def check_normalized(config: ExperimentConfig) -> None:
    """Check that nothing takes an nGPT's weights off the sphere, or scales what is on it. Raises
    ConfigError."""
    module, model = config.train_module, config.model
    if isinstance(model, ModuleConfig) or not model.to_transformer().is_normalized:
        return
    optim, found = module.optim, ErrorList()
    why = "does not go with model.norm_placement normalized"
    decays = {
        f"train_module.optim.{name}": getattr(optim, name, None)
        for name in ("weight_decay", "adamw_weight_decay")
    }
    for number, override in enumerate(optim.group_overrides):
        key = f"train_module.optim.group_overrides.{number}.opts.weight_decay"
        decays[key] = override.opts.get("weight_decay")
    for key, decay in decays.items():
        if decay:
            found.add(ConfigError(f"{decay} {why}; set it to 0", key=key))
    if optim.mup is not None:
        found.add(ConfigError(f"muP {why}; leave it out", key="train_module.optim.mup"))
    if optim.traits().keeps_average:
        problem = f"an average of weights {why}; use adamw, muon or another type"
        found.add(ConfigError(problem, key="train_module.optim.type"))
    for name in ("ema", "model_merger"):
        if getattr(config.trainer.callbacks, name).enabled:
            problem = f"an average of weights {why}; leave it out"
            found.add(ConfigError(problem, key=f"trainer.callbacks.{name}"))
    if module.lora is not None:
        found.add(ConfigError(f"{why}; leave it out", key="train_module.lora"))
    found.raise_any()
