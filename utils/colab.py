"""The course in Colab: what the setup cell of every notebook does there."""

import importlib.metadata
import os
import re
import subprocess
import sys

from utils.settings import ROOT


def set_up(keep_in_drive: bool) -> None:
    """In Colab: install what it lacks (never torch: its own stays), mount Google Drive if asked to,
    tell whether there is a GPU. Raises RuntimeError where packages cannot be installed."""
    text = (ROOT / "requirements.txt").read_text("utf-8").partition("# Not in Colab")[0]
    there = {package.name.lower() for package in importlib.metadata.distributions()}
    wanted = re.findall(r"^(?!torch)([\w-]+)(.*)$", text, re.M)
    if lacking := [name + bounds for name, bounds in wanted if name not in there]:
        print("Installing", ", ".join(lacking))
        command = [sys.executable, "-m", "pip", "install", "--quiet", *lacking]
        if (done := subprocess.run(command, capture_output=True, text=True)).returncode:
            raise RuntimeError(f"pip could not install them, run this cell again: {done.stderr}")
    if keep_in_drive:
        from google.colab import drive

        drive.mount(str(ROOT.parent / "drive"))
        os.environ["AGE_DATA"] = str(ROOT.parent / "drive" / "MyDrive" / ROOT.name)
    import torch

    none = "none. Choose Runtime > Change runtime type > GPU, and run from the top again"
    print("GPU:", torch.cuda.get_device_name() if torch.cuda.is_available() else none)
