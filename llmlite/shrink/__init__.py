"""`llmlite shrink`: find the recipe that makes a model as small as asked at the least expected loss, from sensitivities measured once."""
