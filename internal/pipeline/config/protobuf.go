package config

import (
	"encoding/base64"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protodesc"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/descriptorpb"
)

// validate checks the descriptor set when it stands in the configuration. That of a file is read by the processor alone.
func (p *ProtobufCodec) validate(ps *Problems) {
	const at = "codec.protobuf"
	if (p.DescriptorSet == "") == (p.DescriptorSetFile == "") {
		ps.add(at, "write exactly one of descriptorSet, a file in base64, and descriptorSetFile, its path")
	}
	name := protoreflect.FullName(p.Message)
	if !name.IsValid() {
		ps.add(at+".message", "%q is not the full name of a message; write one such as telemetry.v1.Position", p.Message)
	}
	if p.DescriptorSet == "" {
		return
	}
	data, err := base64.StdEncoding.DecodeString(p.DescriptorSet)
	if err != nil {
		ps.add(at+".descriptorSet", "is not base64; write what base64 -w0 prints of the file")
		return
	}
	var set descriptorpb.FileDescriptorSet
	if err := proto.Unmarshal(data, &set); err != nil || len(set.File) == 0 {
		ps.add(at+".descriptorSet", "is not a descriptor set; make it with protoc --include_imports --descriptor_set_out=set.pb")
		return
	}
	files, err := protodesc.NewFiles(&set)
	if err != nil {
		ps.add(at+".descriptorSet", "cannot be linked (%v); make it with protoc --include_imports", err)
		return
	}
	if !name.IsValid() {
		return
	}
	if d, err := files.FindDescriptorByName(name); err != nil {
		ps.add(at+".message", "the descriptor set has no %s; write the full name of a message in it", name)
	} else if _, ok := d.(protoreflect.MessageDescriptor); !ok {
		ps.add(at+".message", "%s is not a message; write the full name of one", name)
	}
}
