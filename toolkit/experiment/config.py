"""`ExperimentConfig`: everything one training run needs to know."""

from toolkit.config import Config
from toolkit.config.base import Seed
from toolkit.data.config import (
    DataConfig,
    DataLoaderConfig,
    DatasetConfig,
    StoreConfig,
)
from toolkit.models.config import ModelConfig, ModuleConfig
from toolkit.runs.config import RunConfig
from toolkit.train.config import TrainerConfig, TransformerTrainModuleConfig


class ExperimentConfig(Config, kw_only=True):
    """The whole of an experiment, as stored in metadata/config.json."""

    description: str = ""
    """What the experiment is for, in a line."""
    run: RunConfig = RunConfig()
    """Names of the run and the folders it uses."""
    model: ModelConfig | ModuleConfig
    """The architecture; `{"preset": NAME}` in a file stands for a named size."""
    dataset: DatasetConfig = DatasetConfig()
    """Where text comes from and how it becomes tokens."""
    store: StoreConfig = StoreConfig()
    """Where token files are kept for good, and where their local copies lie."""
    data_loader: DataLoaderConfig = DataLoaderConfig()
    """How tokens become batches."""
    train_module: TransformerTrainModuleConfig = TransformerTrainModuleConfig()
    """Optimizer, schedule, precision, parallelism."""
    trainer: TrainerConfig = TrainerConfig()
    """How long, what is recorded, what is called."""
    seed: Seed = 0
    """Seed of initial weights and data order, below 2^64."""

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed must lie between 0 and 2^64 - 1, not {self.seed}")

    @property
    def data(self) -> DataConfig:
        return DataConfig(
            dataset=self.dataset, data_loader=self.data_loader, store=self.store, seed=self.seed
        )
