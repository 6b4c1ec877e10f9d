"""`python -m codebook_tools` is the command `codebook`."""

from codebook_cli.app import main  # type: ignore[import-not-found]  # the folder cli/, as installed

if __name__ == "__main__":
    main()
