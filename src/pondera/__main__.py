"""``python -m pondera``."""

from pondera.cli import main

if __name__ == "__main__":
    main()
