"""8- and 4-bit weights in bitsandbytes' stock formats."""
