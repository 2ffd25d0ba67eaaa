from secateur.cli.app import main

main()
