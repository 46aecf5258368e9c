"""Evaluate a checkpoint: python eval.py --checkpoint quickstart [key=value ...]"""

from ats_detr.cli import run_command

if __name__ == "__main__":
    run_command("eval", prog="eval.py")
