package dirs

import "syscall"

// freeMemory is how many bytes can be written to the file system in memory at path; zero when there is none.
func freeMemory(path string) uint64 {
	const tmpfs = 0x01021994
	var s syscall.Statfs_t
	if err := syscall.Statfs(path, &s); err != nil || s.Type != tmpfs || s.Bsize <= 0 {
		return 0
	}
	return s.Bavail * uint64(s.Bsize)
}
