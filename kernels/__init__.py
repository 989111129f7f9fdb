"""The Triton kernels. Installed as ``fastkd.kernels``."""

if __name__ != "fastkd.kernels":  # from the root of the tree, `import kernels` would find this folder
    raise ImportError("these kernels are the package fastkd.kernels")
