"""Export a trained student to a signed bundle, and install it where the operator's key is trusted.

Takes the folder to write into as its argument; needs `longshore[export]`.
"""

import subprocess
import sys
from pathlib import Path

from longshore.bundle import install, load_trust

MODEL = Path(__file__).parent / "models" / "shop-student"

folder = Path(sys.argv[1])
bundle, key, trust = folder / "shop-student", folder / "operator.key", folder / "trust.json"
for command in (
    ["bundle", "keygen", str(key), "--days", "365"],
    ["bundle", "trust", "add", str(trust), f"{key}.pub"],
    ["export", "student", "--model", str(MODEL), "--out", str(bundle), "--sign-key", str(key)],
):
    subprocess.run([sys.executable, "-m", "longshore.cli", *command], check=True)

installed = install(bundle, folder / "store", trusted_keys=load_trust(trust))
print(f"installed at {installed}")
