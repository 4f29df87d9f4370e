"""Stage plugin: the hash of a file that `plugins` names, for the plan to depend on.

Arguments: FILE.
"""

import hashlib
import sys
from pathlib import Path

if __name__ == "__main__":
    (file,) = sys.argv[1:]
    if ".." in Path(file).parts:  # DVC would take the hash's place for another one
        sys.exit(f"nemo: plugins: {file}: accepted: paths in the project, or absolute ones")
    if not Path(file).is_file():
        sys.exit(f"nemo: plugins: {file}: no such file")
    out = Path(f"plugins/.hashes/{file}")  # joined as text, as DVC does: a path may be absolute
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(hashlib.sha256(Path(file).read_bytes()).hexdigest() + "\n")
