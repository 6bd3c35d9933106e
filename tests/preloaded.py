"""Imported last by the process that ranks are forked from: what is there by then is left out of garbage collections.

DeepSpeed asks for several full ones in each engine. Over everything that was imported each takes half a second, and
writes to every page that the ranks share.
"""

import gc

gc.collect()
gc.freeze()
