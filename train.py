"""Train a detector and the teachers it needs: python train.py --config configs/quickstart.yaml [key=value ...]"""

from ats_detr.cli import run_command

if __name__ == "__main__":
    run_command("train", prog="train.py")
