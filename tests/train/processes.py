# SPDX-License-Identifier: Apache-2.0
"""Training runs in processes of their own, one or several that share the work through gloo."""

import os
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import yaml

from wedlm.train.config import TrainConfig

RUN = "import sys; from wedlm.train.config import load_config; from wedlm.train.trainer import Trainer; "
RUN += "Trainer(load_config(sys.argv[1], {})).run()"
# accelerate offers FSDP on GPUs alone. The code is the same on a CPU once it believes that these are GPUs.
RUN_FSDP = (
    "from accelerate.state import PartialState; from accelerate.utils import DistributedType; "
    "PartialState(cpu=True).distributed_type = DistributedType.MULTI_GPU; " + RUN
)
# The same for DeepSpeed, without the operator that it would compile for a CPU's shared memory.
RUN_DEEPSPEED = (
    "import os, deepspeed; deepspeed.ops.__compatible_ops__['deepspeed_shm_comm'] = False; "
    "from accelerate.state import PartialState; from accelerate.utils import DistributedType; "
    "PartialState(cpu=True).distributed_type = DistributedType.DEEPSPEED; "
    "os.environ['ACCELERATE_USE_CPU'] = 'false'; " + RUN
)
DEEPSPEED = {"ACCELERATE_USE_DEEPSPEED": "true", "DS_ACCELERATOR": "cpu"}
FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "DecoderLayer",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
}


def config_file(config: TrainConfig) -> Path:
    """The configuration as a file beside its output directory."""
    path = Path(config.output_dir).with_suffix(".yaml")
    path.write_text(yaml.safe_dump(config.model_dump()))
    return path


def run_processes(config: TrainConfig, processes: int, program: str = RUN, **environment: str) -> Path:
    """Run ``program`` to its end in so many processes; returns output_dir."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}
    common |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, "-c", program, str(config_file(config))]
    with ExitStack() as stack:
        logs = [Path(config.output_dir).with_suffix(f".rank{rank}.log") for rank in range(processes)]
        running = [
            stack.enter_context(
                subprocess.Popen(
                    command,
                    env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                    stderr=stack.enter_context(log.open("w")),
                )
            )
            for rank, log in enumerate(logs)
        ]
        for process in running:
            stack.callback(process.kill)
        for process, log in zip(running, logs, strict=True):
            assert process.wait(timeout=300) == 0, log.read_text()
    return Path(config.output_dir)
