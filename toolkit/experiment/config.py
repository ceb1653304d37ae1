"""`ExperimentConfig`: everything one training run needs to know."""

from toolkit.config import Config
from toolkit.data.config import DataConfig, DataLoaderConfig, DatasetConfig
from toolkit.models.config import ModelConfig
from toolkit.runs.config import RunConfig
from toolkit.train.config import TrainerConfig, TransformerTrainModuleConfig


class ExperimentConfig(Config, kw_only=True):
    """The whole of an experiment, as stored in metadata/config.json."""

    run: RunConfig = RunConfig()
    model: ModelConfig
    dataset: DatasetConfig = DatasetConfig()
    data_loader: DataLoaderConfig = DataLoaderConfig()
    train_module: TransformerTrainModuleConfig = TransformerTrainModuleConfig()
    trainer: TrainerConfig = TrainerConfig()
    seed: int = 0
    """Seed of initial weights and data order."""

    @property
    def data(self) -> DataConfig:
        """The part that `get_dataloaders` needs."""
        return DataConfig(dataset=self.dataset, data_loader=self.data_loader, seed=self.seed)
