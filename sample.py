""":"
for python in "${VIRTUAL_ENV:+$VIRTUAL_ENV/bin/python}" \
    "$(dirname "$0")/.venv/bin/python" "$(command -v python3)"; do
    [ -x "$python" ] && exec "$python" "$0" "$@"
done
echo "$0: no Python found" >&2; exit 127
":"""

# To read: folio/generation/sampling.py (sampling with a KV cache) and folio/commands/sample.py (the options).

from folio.cli import main

if __name__ == "__main__":
    main("sample")
