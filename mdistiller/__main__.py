import sys

from mdistiller.cli import main

sys.exit(main())
