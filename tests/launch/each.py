"""Started by torchrun: several trainings one after the other in one set of processes. `each.py
JSON`, a list of lists of arguments."""

import gc
import json
import sys

import torch.distributed as dist

from launch.programs import train_here


def main():
    dist.init_process_group("gloo")
    for arguments in json.loads(sys.argv[1]):
        said = train_here(*arguments)
        if dist.get_rank() == 0:
            print(json.dumps({"arguments": arguments, "said": said}), flush=True)
        gc.collect()
        gc.freeze()  # what the first imported: see tests/integrations/deepspeed_setting.py
    dist.destroy_process_group()


main()
