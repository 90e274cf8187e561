"""A Penstock server whose model hangs from the moment when the file HOLD exists (the engine's test hook)."""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path

from penstock.config import load_config
from penstock.serving.engine import Engine
from penstock.serving.server import ServerSettings, run


def main(config: Path, hold: Path) -> int:
    engine = Engine.from_config(config)

    def watch() -> None:
        while not hold.exists():
            time.sleep(0.005)
        for model in engine.live.live.values():
            model.served._hold(True)

    threading.Thread(target=watch, daemon=True).start()
    try:
        return run(engine, ServerSettings.from_config(load_config(config)), lambda addresses: None)
    finally:
        for model in engine.live.live.values():
            model.served._hold(False)
        engine.close()


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
