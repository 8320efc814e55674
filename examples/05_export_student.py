"""Export a trained student to a bundle for the device, and install it.

Takes the folder to write into as its argument; needs `longshore[export]`.
"""

import subprocess
import sys
from pathlib import Path

from longshore.bundle import install

MODEL = Path(__file__).parent / "models" / "shop-student"

folder = Path(sys.argv[1])
bundle = folder / "shop-student"
command = ["export", "student", "--model", str(MODEL), "--out", str(bundle)]
subprocess.run([sys.executable, "-m", "longshore.cli", *command], check=True)

installed = install(bundle, folder / "store")
print(f"installed at {installed}")
