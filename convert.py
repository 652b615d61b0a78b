from llama3v_mlx.convert import main

if __name__ == "__main__":
    main()
