"""The project's kernels. With this file the folder comes before an installed package of the same name."""
