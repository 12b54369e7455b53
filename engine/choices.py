"""Groups of an earlier stage that a later stage's command chooses again, to admit a class of the user's own by its config.

python train.py --config-dir myconf stage=prior ckpt=runs/vqgan/mine data=mine
"""

FIRST_STAGE = ("data", "model", "quantizer")

# stage -> the groups that it takes from a checkpoint; `own` in conf/stage/*.yaml has a place for each
CHECKPOINT_GROUPS = {
    "distill": FIRST_STAGE,
    "prior": FIRST_STAGE,
    "extract": FIRST_STAGE,
    "sample": (*FIRST_STAGE, "prior"),
    "explore": (*FIRST_STAGE, "prior"),
    "evaluate": (*FIRST_STAGE, "prior"),
    "export": ("model", "quantizer", "prior"),
    "compress": ("model", "quantizer", "prior"),
    "decompress": ("model", "quantizer", "prior"),
}


def route_choices(words: list[str]) -> list[str]:
    """Command-line words in which data=mine is data@own.data=mine, where the stage takes its data from a checkpoint."""
    stage = next((word.removeprefix("stage=") for word in words if word.startswith("stage=")), "")
    groups = CHECKPOINT_GROUPS.get(stage, ())
    routed = []
    for word in words:
        group, equals, option = word.partition("=")
        routed.append(f"{group}@own.{group}={option}" if equals and group in groups else word)
    return routed
