"""Stage plugin: the hash of a file that `plugins` names, for the plan to depend on.

Arguments: FILE.
"""

import hashlib
import sys
from pathlib import Path

if __name__ == "__main__":
    (file,) = sys.argv[1:]
    if not Path(file).is_file():
        sys.exit(f"nemo: params.yaml: plugins: {file}: no such file")
    out = Path("plugins/.hashes", file)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(hashlib.sha256(Path(file).read_bytes()).hexdigest() + "\n")
