"""Graph passes: FX graph in, FX graph out; they import the kernels' floor and nothing above."""
