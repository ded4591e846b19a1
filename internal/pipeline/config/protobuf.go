package config

import (
	"encoding/base64"
	"fmt"
	"strings"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protodesc"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/descriptorpb"

	"github.com/millrace-dev/millrace/internal/pipeline/expression"
)

// validateIn checks the descriptor set, and the paths into its message, when it stands in the configuration. That of a file is read
// by the processor alone.
func (p *ProtobufCodec) validateIn(ps *Problems, c *Config) {
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
	found, err := files.FindDescriptorByName(name)
	if err != nil {
		ps.add(at+".message", "the descriptor set has no %s; write the full name of a message in it", name)
		return
	}
	d, ok := found.(protoreflect.MessageDescriptor)
	if !ok {
		ps.add(at+".message", "%s is not a message; write the full name of one", name)
		return
	}
	p.validatePaths(ps, "mapping", &c.Mapping, d)
	for i, b := range c.Sink.FanOut {
		if b.Mapping != nil {
			p.validatePaths(ps, c.Sink.path(i)+".mapping", b.Mapping, d)
		}
	}
}

// validatePaths finds the fields that columns name, as the processor will.
func (p *ProtobufCodec) validatePaths(ps *Problems, at string, m *Mapping, d protoreflect.MessageDescriptor) {
	for i, col := range m.Columns {
		names, err := SplitPath(col.Path)
		if col.Path == "" || IsProperty(col.Path) || err != nil {
			continue
		}
		for in, n := d, 0; n < len(names); n++ {
			field := in.Fields().ByName(protoreflect.Name(names[n]))
			if field == nil {
				ps.add(fmt.Sprintf("%s.columns[%d].path", at, i), "message %s has no field %s; write one of %s", in.FullName(), names[n], fieldNames(in))
				break
			}
			if field.IsList() || field.IsMap() || field.Message() != nil && !expression.IsPlain(field.Message()) {
				break // below it is JSON
			}
			if in = field.Message(); in == nil {
				if n+1 < len(names) {
					ps.add(fmt.Sprintf("%s.columns[%d].path", at, i), "field %s has no parts; end the path there", field.FullName())
				}
				break
			}
		}
	}
}

func fieldNames(d protoreflect.MessageDescriptor) string {
	names := make([]string, d.Fields().Len())
	for i := range names {
		names[i] = string(d.Fields().Get(i).Name())
	}
	return strings.Join(names, ", ")
}
