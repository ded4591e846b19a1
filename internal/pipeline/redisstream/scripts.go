package redisstream

import (
	"embed"

	"github.com/redis/rueidis"
)

//go:embed scripts/*.lua
var scripts embed.FS

var (
	ackDeleteScript   = script("ack_delete")
	countScript       = script("count")
	extentScript      = script("extent")
	leaseScript       = script("lease")
	ownedScript       = script("owned")
	refreshScript     = script("refresh")
	releaseScript     = script("release")
	releaseNackScript = script("release_nack")
	removeStaleScript = script("remove_stale")
	trimScript        = script("trim")
)

func script(name string) *rueidis.Lua {
	text, err := scripts.ReadFile("scripts/" + name + ".lua")
	if err != nil {
		panic(err) // it is part of the program
	}
	return rueidis.NewLuaScript(string(text))
}
