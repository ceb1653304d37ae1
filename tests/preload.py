"""What a run imports, imported once in the server that runs and warm workers are forked from.

Only imports: no tensor is computed here, so there is no thread that a fork would lose. Collections
of garbage pass over all that is imported: it is half a million objects, a third of a second each.
"""

import gc
import os

os.environ |= {"OMP_NUM_THREADS": "1", "TOOLKIT_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
os.environ |= {"HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu"}

import deepspeed.runtime.zero.stage3  # noqa: F401
import pytest  # noqa: F401 (the children's main module)
import torch
import torch._inductor.compile_fx
import torch.distributed.checkpoint
import torch.distributed.fsdp
import torch.distributed.tensor
from accelerate import Accelerator  # noqa: F401
from torch.utils import tensorboard  # noqa: F401

import toolkit.cli.main
import toolkit.data.loader
import toolkit.data.prepare.build.prepare
import toolkit.experiment.run
import toolkit.hf.export
import toolkit.train.trainer  # noqa: F401

torch.set_num_threads(1)
gc.collect()
gc.freeze()
