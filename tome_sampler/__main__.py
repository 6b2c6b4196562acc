import sys

from tome_sampler.cli import main

sys.exit(main())
