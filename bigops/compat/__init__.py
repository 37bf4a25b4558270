"""Other packages' faces, each a module of that package's name: a program changes one import."""
