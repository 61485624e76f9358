""":"
for python in "${VIRTUAL_ENV:+$VIRTUAL_ENV/bin/python}" \
    "$(dirname "$0")/../.venv/bin/python" "$(command -v python3)"; do
    [ -x "$python" ] && exec "$python" "$0" "$@"
done
echo "$0: no Python found" >&2; exit 127
":"""

# To read: folio/doors/ (the flags of GPT-from-scratch) and folio/preparation/job.py (text to token files).

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from folio.cli import main

if __name__ == "__main__":
    main("tokenize_documents_parallel")
