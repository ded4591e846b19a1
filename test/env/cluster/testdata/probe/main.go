// Command probe tells from inside of a pod what the pod can reach: it fetches the URL that it is asked about.
package main

import (
	"fmt"
	"io"
	"net/http"
	"os"
	"time"
)

func main() {
	fmt.Println("probe is listening")
	client := http.Client{Timeout: 3 * time.Second}
	err := http.ListenAndServe(":8080", http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		url := r.URL.Query().Get("url")
		if url == "" {
			fmt.Fprint(w, "hello from the probe")
			return
		}
		response, err := client.Get(url)
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadGateway)
			return
		}
		defer response.Body.Close()
		w.WriteHeader(response.StatusCode)
		_, _ = io.Copy(w, response.Body)
	}))
	fmt.Fprintln(os.Stderr, err)
	os.Exit(1)
}
